"""One member that steps by itself: through autograd any architecture, activation and temporal term, or by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..loss.objective import StepResult
from ..sae.protocol import RowTokens
from ..step.autograd import autograd_step
from ..step.descent import clip, descend, lies_transposed
from .member import Member, Update
from .schedule import set_rate


class Single:
    """A member and its step.

    Args:
        member: whose weights are changed in place.
        step: what finds its gradients.

    """

    def __init__(self, member: Member, step: Callable[..., StepResult] = autograd_step):
        self.members, self._step = [member], step
        self._turned = [weight for weight in member.sae.parameters() if lies_transposed(weight)]

    def train_step(
        self,
        x_NWD: Tensor,
        partners: Sequence[Tensor | None] | None = None,
        *,
        share: float = 1.0,
        rows: RowTokens | None = None,
    ) -> list[Update]:
        """One step on scaled windows, which are ``share`` of the batch's; see :meth:`.stack.Stack.train_step`.

        ``rows``: which tokens count, where whole rows are seen.
        On a CPU, nothing changes if the loss or the gradient is not finite.
        """
        (member,) = self.members
        sae, config, objective = member.sae, member.config, member.current_objective()
        lr = set_rate([member.optimiser], *member.place, config.optimiser)
        sae.zero_grad(set_to_none=True)
        result = self._step(
            sae,
            x_NWD,
            objective,
            partner_NP=partners[0] if partners else None,
            dead_F=member.dead if objective.aux_weight > 0 else None,
            compute_dtype=member.compute_dtype,
            rows=rows,
        )
        result = member.world.combine(sae, result, share)
        if config.sae.decoder == "unit":
            sae.project_gradients()
        (norm,) = clip([list(sae.parameters())], config.optimiser.clip)
        update = Update(result, objective, norm, lr)
        if x_NWD.device.type == "cpu" and not update.is_finite:
            return [update]
        descend(member.optimiser, self._turned)
        if config.sae.decoder == "unit":
            sae.constrain()
        for parameter in sae.fast_parameters():
            parameter.data.clamp_(min=0)
        n_tokens = x_NWD.shape[0] * (1 if objective.current_only else x_NWD.shape[1]) if rows is None else rows.n_tokens
        n_tokens = round(n_tokens / share)
        member.idle_F += n_tokens
        member.idle_F.masked_fill_(result.fired_F > 0, 0)
        member.after_step(result, x_NWD, n_tokens, share)
        return [update]
