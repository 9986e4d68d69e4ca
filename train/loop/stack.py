"""Members that step together: of one shape, each what it would be alone, in a fraction of the calls where calls are
what costs.

Weights, gradients and counters of a stack lie one after the other in single tensors; every member's own are views of
its part, so that checkpoints, diagnostics and exports know nothing of stacks. Whatever differs between members, such as
λ1, λ2, the temporal form and its partners, the seed and the dead features, is each member's own. A stack of one is a
member by itself.

Shapes: M members, N windows, W positions, D model width, F features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..loss.objective import Objective, StepResult
from ..sae.protocol import RowTokens
from ..sae.temporal_sae import TemporalSAE
from ..sae.unit_rows import drop_radial, make_unit
from ..step.by_hand import Stacked, sparse_step, stacked_step
from ..step.descent import clip, descend
from .member import Member, Update
from .schedule import set_rate


class Stack:
    """Members that step as one.

    Args:
        members: of one shape, activation, decoder, optimiser and number of steps (:func:`.memory_plan.stacks`), at the
            same step. Their weights become views.

    """

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        saes = [_by_hand(member) for member in members]
        self.sae = saes[0]
        thresholds = [sae.threshold for sae in saes if isinstance(sae.threshold, nn.Parameter)]
        self.weights = Stacked(
            W_enc=_joined([sae.W_enc for sae in saes], feature_major=True),
            b_enc=_joined([sae.b_enc for sae in saes]),
            W_dec=_joined([sae.W_dec for sae in saes]),
            b_dec=_joined([sae.b_dec for sae in saes]),
            threshold=_joined(thresholds) if thresholds else None,
        )
        self._parameters = [list(sae.parameters()) for sae in saes]
        self._idle_MF = _joined([member.idle_F for member in members])
        self._gradients_of_rows: list[tuple[Tensor | None, Tensor]] = []  # and these rows
        self._optimiser = members[0].optimiser if len(members) == 1 else _joint_optimiser(members)

    def train_step(
        self,
        x_NWD: Tensor,
        partners: Sequence[Tensor | None] | None = None,
        *,
        share: float = 1.0,
        rows: RowTokens | None = None,  # noqa: ARG002 - whole rows are for architectures that step by themselves
    ) -> list[Update]:
        """One step of every member on scaled windows, which are ``share`` of the batch's.

        On a CPU, nothing changes in any member if the loss or gradient of one is not finite.

        Args:
            x_NWD: what all members see.
            partners: of every member, see :class:`..loss.terms.Pairs`; None: nobody has partners that are not
                neighbours.
            share: part of the batch that this process has.
            rows: never given.

        """
        first = self.members[0]
        optimisers = {id(each): each for each in (self._optimiser, *(m.optimiser for m in self.members))}
        lr = set_rate(optimisers.values(), *first.place, first.config.optimiser)
        objectives = [member.current_objective() for member in self.members]
        results = self._gradients(x_NWD, objectives, partners or [None] * len(self.members))
        pairs = zip(self.members, results, strict=True)
        results = [member.world.combine(member.sae, result, share) for member, result in pairs]
        self._keep_rows_unit()
        norms = clip(self._parameters, self.members[0].config.optimiser.clip)
        updates = [Update(*each, lr) for each in zip(results, objectives, norms, strict=True)]
        if x_NWD.device.type == "cpu" and not all(update.is_finite for update in updates):
            return updates
        self._descend()
        n_tokens = round(x_NWD.shape[0] * (1 if objectives[0].current_only else x_NWD.shape[1]) / share)
        self._idle_MF += n_tokens
        self._idle_MF.masked_fill_(torch.stack([result.fired_F for result in results]) > 0, 0)
        for member, result in zip(self.members, results, strict=True):
            member.after_step(result, x_NWD, n_tokens, share)
        return updates

    def _gradients(
        self, x_NWD: Tensor, objectives: Sequence[Objective], partners: Sequence[Tensor | None]
    ) -> list[StepResult]:
        """Of all members, into ``.grad`` of their parameters."""
        dead = [
            m.dead if objective.aux_weight > 0 else None for m, objective in zip(self.members, objectives, strict=True)
        ]
        compute_dtype = self.members[0].compute_dtype
        for parameter in itertools.chain(*self._parameters):
            parameter.grad = None
        saes = [_by_hand(member) for member in self.members]
        if len(saes) == 1:
            options = {"partner_NP": partners[0], "dead_F": dead[0], "compute_dtype": compute_dtype}
            result = sparse_step(self.sae, x_NWD, objectives[0], **options)
            self._gradients_of_rows = [(self.sae.W_dec.grad, self.sae.W_dec)]
            return [result]
        dead_MF = None if dead[0] is None else torch.stack([each for each in dead if each is not None])
        options = {"dead_MF": dead_MF, "compute_dtype": compute_dtype}
        results, gradients = stacked_step(self.weights, saes, x_NWD, objectives, partners, **options)
        for m, sae in enumerate(saes):
            sae.W_enc.grad, sae.b_enc.grad = gradients.W_enc[m].t(), gradients.b_enc[m]
            sae.W_dec.grad, sae.b_dec.grad = gradients.W_dec[m], gradients.b_dec[m]
            if sae.threshold is not None and gradients.threshold is not None:
                sae.threshold.grad = gradients.threshold[m]
        self._gradients_of_rows = [(gradients.W_dec, self.weights.W_dec)]
        return results

    def _keep_rows_unit(self) -> None:
        if self.members[0].config.sae.decoder == "unit":
            for gradient, rows in self._gradients_of_rows:
                assert gradient is not None  # noqa: S101 - for the type checker
                drop_radial(gradient, rows)
        self._gradients_of_rows = []  # so that the next step finds their memory free

    @torch.no_grad()
    def _descend(self) -> None:
        """The optimiser's step, and what holds of the weights after it."""
        for member, parameters in zip(self.members, self._parameters, strict=True):
            for parameter in parameters:  # whose state may just have been loaded
                self._optimiser.state[parameter] = member.optimiser.state[parameter]
        descend(self._optimiser, [member.sae.W_enc for member in self.members])
        if self.members[0].config.sae.decoder == "unit":
            make_unit(self.weights.W_dec)
        if self.weights.threshold is not None:
            self.weights.threshold.clamp_(min=0)


def _by_hand(member: Member) -> TemporalSAE:
    """The member's SAE, which is of the architecture that is stepped by hand (:func:`..step.registry.choose_step`)."""
    assert isinstance(member.sae, TemporalSAE)  # noqa: S101 - for the type checker
    return member.sae


@torch.no_grad()
def _joined(parts: Sequence[Tensor], *, feature_major: bool = False) -> Tensor:
    """Tensors of one shape one after the other in a new one [M, ..], of which they become views; a single
    one as it is.
    """
    lying = [part.data.t() if feature_major else part.data for part in parts]
    if len(parts) == 1:
        return lying[0].unsqueeze(0)
    joined = torch.stack(lying)
    for part, own in zip(parts, joined, strict=True):
        part.data = own.t() if feature_major else own
    return joined


def _joint_optimiser(members: Sequence[Member]) -> torch.optim.Optimizer:
    """One optimiser over the parameters of all; their states stay with the members."""
    first = members[0].optimiser
    alike = zip(*(member.optimiser.param_groups for member in members), strict=True)
    groups = [{**each[0], "params": [parameter for group in each for parameter in group["params"]]} for each in alike]
    return type(first)(groups)  # pyright: ignore[reportCallIssue] - Adam or AdamW, which have defaults
