"""What is learned of preferences: the loss of direct preference optimisation (DPO, arXiv:2305.18290), pair by pair."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fft.arguments import TrainArguments


@dataclass(frozen=True)
class Preference:
    """How pairs become losses.

    The reward of a document is ``beta`` times by how much its log-probability exceeds that of the reference model; with
    ``length_normalized``, both are means over the tokens that are trained on (as in arXiv:2411.15124), not sums. The
    loss is -log sigmoid(reward of the chosen - reward of the rejected), and ``sft_weight`` times the negative mean
    log-probability of the chosen one's tokens (arXiv:2404.19733).
    """

    beta: float
    length_normalized: bool = False
    sft_weight: float = 0.0

    @classmethod
    def of(cls, args: TrainArguments) -> "Preference":
        """As flags say."""
        return cls(args.dpo_beta, args.dpo_length_normalized, args.dpo_sft_weight)

    def losses(self, policy: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of log-probabilities [pairs, 2] of what was chosen and what was rejected, which have so many ``tokens``
        [pairs, 2]: losses [pairs], and rewards [pairs, 2], of which nothing is learned.
        """
        gained, tokens = policy - reference, tokens.clamp(min=1)
        if self.length_normalized:
            gained = gained / tokens
        rewards = self.beta * gained
        losses = -logsigmoid(rewards[:, 0] - rewards[:, 1])
        if self.sft_weight:
            losses = losses - self.sft_weight * policy[:, 0] / tokens[:, 0]
        return losses, rewards.detach()


#: What is told of pairs, in the means: names of TRL, which users know.
MEASURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def measures_of(rewards: Tensor) -> Tensor:
    """Sums over pairs of :data:`MEASURES`, and the number of pairs, float64 [5], of rewards [pairs, 2]."""
    chosen, rejected = rewards.double().unbind(1)
    sums = (chosen, rejected, chosen - rejected, (chosen > rejected).double(), torch.ones_like(chosen))
    return torch.stack([x.sum() for x in sums])
