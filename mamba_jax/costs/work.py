"""What a part of a model does for each token; ``costs.flops`` says how it is counted."""

import dataclasses
import operator

Amount = int | float


@dataclasses.dataclass(frozen=True)
class Work:
    """Amounts, each per token."""

    matmul_flops: Amount = 0
    elementwise_flops: Amount = 0
    special_ops: Amount = 0
    weight_bytes: Amount = 0  # weights read, gradients of weights and optimizer state
    activation_bytes: Amount = 0

    @property
    def bytes(self) -> Amount:
        return self.weight_bytes + self.activation_bytes

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, self._amounts(), other._amounts()))

    def __mul__(self, times: Amount) -> "Work":
        return Work(*(times * amount for amount in self._amounts()))

    def _amounts(self) -> tuple[Amount, ...]:
        # Not by ``dataclasses.astuple``, which copies deeply: a plan adds up thousands of these.
        return (
            self.matmul_flops,
            self.elementwise_flops,
            self.special_ops,
            self.weight_bytes,
            self.activation_bytes,
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """The work of one part of the model."""

    name: str
    forward: Work
    backward: Work  # of the gradient alone
    recomputed: Work = Work()  # what the backward recomputes of the forward

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.name,
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )

    def __mul__(self, times: Amount) -> "Part":
        works = (self.forward * times, self.backward * times, self.recomputed * times)
        return Part(self.name, *works)

    @property
    def training(self) -> Work:
        """Forward and gradient, without what is recomputed: the model's share."""
        return self.forward + self.backward

    @property
    def hardware(self) -> Work:
        """All that a device does in training."""
        return self.training + self.recomputed
