# The server: docker compose up, or
#
#   docker build --tag mamba_jax .                               for a CPU
#   docker build --tag mamba_jax --build-arg EXTRA=cuda12 .      for an NVIDIA GPU; cuda13 as well
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume "$PWD/checkpoints/quickstart:/checkpoint:ro" mamba_jax
#
# Arguments after the image's name go to `mamba-jax serve`: --max_batch 32, ….
FROM python:3.12-slim

ARG EXTRA=""
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
# An empty package first, so that a change of the code does not rebuild the dependencies' layer.
RUN mkdir mamba_jax && echo '__version__ = "0"' > mamba_jax/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt ".[serve${EXTRA:+,$EXTRA}]"
COPY mamba_jax mamba_jax
RUN pip install --no-cache-dir --no-deps . \
    && useradd --uid 1000 --create-home server \
    && install --directory --owner server /home/server/.cache

USER server
WORKDIR /home/server
EXPOSE 8000
# The server compiles before it is ready.
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["python", "-m", "mamba_jax.serve", "--checkpoint", "/checkpoint", "--host", "0.0.0.0", "--port", "8000"]
