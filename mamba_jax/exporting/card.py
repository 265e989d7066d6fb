"""The model card: data, measured metrics, limits; it claims nothing that was not measured."""

from mamba_jax.checkpoints.folder import Metadata


def model_card(
    metadata: Metadata, dtype: str, begins_with: str, notes: str, library: str = "transformers"
) -> str:
    """Returns README.md.

    Args:
      metadata: the checkpoint's metadata.
      dtype: dtype of the weights, in words.
      begins_with: the name of the token that the tokenizer puts before every text.
      notes: about chats and special tokens.
      library: the library that loads the files.
    """
    config, model = metadata.config, metadata.config.model
    measured = [f"| {name} | {value:.6g} |" for name, value in sorted(metadata.metrics.items())]
    table = ["| metric | value |", "|---|---|", *measured]
    runs_code = not model.is_plain and library == "transformers"
    family = "Mamba" if model.is_plain else "Hybrid Recursive Mamba"
    plan = f" (plan {model.plan})" if model.plan else ""
    custom = ["tags: [mamba, custom_code]"] if runs_code else ["tags: [mamba]"]
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            "pipeline_tag: text-generation",
            *custom,
            "---",
            f"# {config.name}",
            "",
            f"A {family} language model trained with mamba_jax: {model.n_layers} "
            f"layers{plan}, d_model {model.d_model}, d_state {model.d_state}; weights in {dtype}.",
            "",
            "## Data",
            f"{_data(metadata)}; {metadata.samples_seen} windows of {model.max_seq_len} tokens "
            f"seen in {metadata.step} steps. Tokenizer: {config.data.tokenizer}.",
            "",
            "## Metrics",
            *(table if measured else ["None were measured at this step."]),
            "",
            notes,
            "## Limits",
            f"Trained on windows of {model.max_seq_len} tokens; longer texts were not tested. A "
            f"text must begin with {begins_with}, which the tokenizer here adds. Not checked for "
            "bias, truth or safety. Metrics are measured on the held-out part of the data only.",
            "",
        ]
    )


def _data(metadata: Metadata) -> str:
    parts = [
        " and ".join(
            filter(
                None, (source.dataset, source.data_dir, source.tasks and f"tasks {source.tasks}")
            )
        )
        for source in metadata.config.data.sources
    ]
    return ", ".join(filter(None, parts)) or "not recorded"
