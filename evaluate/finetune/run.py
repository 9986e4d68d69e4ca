"""``pipeline finetune``: a finished run's SAE, trained on through the upper layers, as a run of its own beside it.

Whole rows of the store are shown in random order. The new run has a record, metrics and checkpoints like any other:
it goes on where it was stopped, and is evaluated beside the run it came from.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...cache.format.manifest import StoreManifest
from ...cache.store import ActivationStore
from ...cache.stream import TokenStream
from ...cache.views import Rows
from ...console import Progress, format_count, format_duration, note, progress, warn
from ...errors import ResourceError, RunError, UsageError
from ...extract.config import ModelSource
from ...extract.model.load import identify_model, load_language_model, outline_model
from ...plugins import changed_plugin, load_plugins
from ...sites import Location
from ...system.device import DTYPES, resolve_device, resolve_dtype
from ...system.free_memory import peak_memory
from ...system.untrusted_files import seed_number
from ...train.config import TrainConfig
from ...train.loop.alarms import check_divergence, check_finite, check_weights, collapse
from ...train.loop.batches import BatchReader, open_batches
from ...train.loop.diagnostics import Metrics, diagnose
from ...train.loop.inputs import Inputs
from ...train.loop.member import Member, Update, dead_after
from ...train.loop.single import Single
from ...train.loop.threshold import calibrate_thresholds
from ...train.loop.trainer import interruptible, live_table
from ...train.loop.warm_start import begin_from_source
from ...train.plan import MemberPlan
from ...train.presets import changed
from ...train.records import metadata_of, new_record
from ...train.run_folder.checkpoint import drop_checkpoints, latest_common, load_checkpoint, save_checkpoint
from ...train.run_folder.member_folders import MemberFolder, locked, member_folders
from ...train.run_folder.metrics_log import MetricsLog
from ...train.run_folder.record import RunRecord, load_run
from ...train.sae.protocol import SparseAutoencoder
from ..model.splice import Head, SplicedModel
from .config import FinetuneConfig
from .step import KLStep, RowBatches

ORIGINAL = "finetuned_from"
"""In the SAE's metadata: the name of the run that it was before."""
_FEWEST_STEPS, _PART = 100, 20
_VIEW = Rows()


@dataclass(frozen=True)
class FinetuneSummary:
    """What :func:`finetune_run` did."""

    folder: str
    """The new run."""
    run: str
    skipped: bool
    """It was finished before."""
    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float | None]
    """The last ones, as in ``metrics.jsonl``."""
    kl_before: float | None
    """KL of the first batch, before any step."""


def finetune_run(config: FinetuneConfig) -> FinetuneSummary:
    """Train a finished run's SAE on; go on with what was begun, keep what is finished.

    Raises:
        RunError: no such run, not finished, damaged, or of a kind or a place that cannot be trained so; the store or
            the model is another one; the new folder holds something else.
        UsageError: settings that the run cannot be trained with.
        ResourceError: out of memory.
        KeyboardInterrupt: Ctrl-C; a checkpoint is written, and its message says how to go on.

    """
    began = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("finetune runs in one process: start it without torchrun")
    source = _Source.of(config)
    folder = source.member_folder()
    if not folder.done:
        with locked([folder]):
            _train(source, folder)
    record = load_run(folder.folder)
    return FinetuneSummary(
        folder=str(folder.folder),
        run=config.run,
        skipped=folder.done,
        steps=record.steps,
        tokens=record.tokens,
        seconds=time.perf_counter() - began,
        metrics=record.metrics,
        kl_before=record.finetuned.get("kl_before"),
    )


def _train(source: _Source, folder: MemberFolder) -> None:
    try:
        work = _Finetuning(source, folder)
        with closing(work.reader):
            work.run()
    except torch.OutOfMemoryError as failure:
        batch = format_count(source.plan.config.data.batch_size)
        raise ResourceError(
            f"{source.device} ran out of memory with {batch} tokens per step through the upper layers: give a smaller "
            "--batch-size (and --fresh)"
        ) from failure


@dataclass(frozen=True)
class _Source:
    """The run that is trained further, its store, and what the new run is to be."""

    config: FinetuneConfig
    record: RunRecord
    store: ActivationStore
    plan: MemberPlan
    device: torch.device

    @classmethod
    def of(cls, config: FinetuneConfig) -> _Source:
        """Everything that can be told without a language model.

        Raises:
            RunError, UsageError: see :func:`finetune_run`.

        """
        folder = Path(config.run)
        record = load_run(folder)
        if not record.finished:
            raise RunError(
                f"{folder} has trained {record.steps} of {record.planned_steps} steps: finish it with `pipeline train` "
                "first"
            )
        record.check_files(folder)
        given = load_plugins(config.plugins)
        if (plugin := changed_plugin(record.plugins, given)) is not None:
            raise RunError(f"{folder}: {plugin}; give it with --plugin as it was")
        sae = SparseAutoencoder.load(folder)
        _check_kind(folder, record, sae)
        store = ActivationStore.open(config.store or record.store)
        _check_store(folder, record, store)
        out = Path(config.out) if config.out else folder.with_name(folder.name + "-finetuned")
        if out.resolve() == folder.resolve():
            raise UsageError(f"--out {out} is the run itself: give another folder")
        device = resolve_device(config.device)
        plan = MemberPlan(out.name, _settings(config, record, out), record.role, None, sae.d_model)
        return cls(config, record, store, plan, device)

    @property
    def at(self) -> Location:
        """Where the SAE belongs."""
        return self.record.location

    def member_folder(self) -> MemberFolder:
        """The new run's folder and its state.

        Raises:
            RunError: it holds something else.

        """
        (found,) = member_folders([self.plan], self.store, fresh=self.config.fresh)
        if found.record is not None:
            said, asked = found.record.finetuned, _choices(self.config)
            for name, value in asked.items():
                if said.get(name) != value:
                    raise RunError(
                        f"{found.folder} holds another run: {name} was {said.get(name)!r} and is now {value!r}; give "
                        "another --out, or replace it with --fresh"
                    )
        if found.failure:
            raise RunError(f"{found.failure} ({found.folder})")
        return found


def _check_kind(folder: Path, record: RunRecord, sae: SparseAutoencoder) -> None:
    if sae.sees == "window":
        raise RunError(
            f"{folder} is of architecture {sae.architecture}, which has one code for a window of positions and no "
            "reconstruction of whole rows to splice: it cannot be fine-tuned"
        )
    if record.config.get("temporal", {}).get("per_feature", "none") != "none":
        raise RunError(
            f"{folder} was trained with λ2 per feature, which was measured while it trained and is not kept: it cannot "
            "be fine-tuned"
        )


def _check_store(folder: Path, record: RunRecord, store: ActivationStore) -> None:
    if not store.manifest.of_language_model:
        raise RunError(
            f"{store.path} holds imported vectors of {store.manifest.model.id}: there is no language model through "
            f"which {folder} could be trained"
        )
    if (store.location, store.d_model) != (record.location, record.store_manifest["d_model"]):
        theirs = f"{store.path} holds layer {store.location}, width {store.d_model}"
        raise RunError(
            f"{theirs}; the run is of layer {record.location}, width {record.store_manifest['d_model']}: name its own "
            "store with --store"
        )
    if store.manifest.model.load_in:
        raise RunError(
            f"{store.path} was extracted from weights in {store.manifest.model.load_in}, through which no gradient is "
            f"taken: {folder} cannot be fine-tuned"
        )
    trained = StoreManifest.model_validate(record.store_manifest).model
    if store.manifest.model.fingerprint != trained.fingerprint:
        raise RunError(
            f"{store.path} was extracted from other weights ({store.manifest.model.id}, fingerprint "
            f"{store.manifest.model.fingerprint[:12]}) than {folder} was trained on ({trained.id}, "
            f"{trained.fingerprint[:12]}): name its own store with --store"
        )


def _settings(config: FinetuneConfig, record: RunRecord, out: Path) -> TrainConfig:
    """The new run's configuration: the old one's, and what differs."""
    before = TrainConfig.model_validate(record.config)
    batch = config.batch_size or before.data.batch_size
    steps = config.tokens // batch or 1 if config.tokens else max(_FEWEST_STEPS, record.tokens // _PART // batch)
    changes: dict[str, Any] = {
        "data.store": config.store or record.store,
        "data.batch_size": batch,
        "data.pool": 0,
        "data.seed": before.data.seed if config.seed is None else seed_number(config.seed),
        # What dead features are stays as it was, though the run is shorter.
        "loss.dead_after": dead_after(before),
        "loss.l1_warmup": 0.0,
        "temporal.warmup": 0.0,
        "optimiser.lr": config.lr or before.optimiser.lr / 3,
        "optimiser.warmup": steps,
        "optimiser.warmup_share": 0.05,
        "optimiser.decay_share": 0.95,
        "optimiser.decay": "linear",
        "optimiser.final_lr": 0.0,
        "run.steps": steps,
        "run.tokens": config.tokens,
        "run.init_from": config.run,
        "run.out": str(out.parent),
        "run.name": out.name,
        "run.baseline": False,
        "run.step": "autograd",
        "run.plugins": config.plugins,
        "run.device": config.device,
        "run.dtype": config.dtype,
        "run.log": ("jsonl",),
        "run.log_every": config.log_every,
        "run.checkpoint_every": config.checkpoint_every,
        "run.checkpoint_minutes": config.checkpoint_minutes,
    }
    reached = record.metrics.get("sparsity_weight")
    if before.loss.target_l0 and before.loss.l0_penalty == "linear" and reached:
        changes["loss.l1"] = reached  # where the controller had brought it
    return changed(before, changes)


def _choices(config: FinetuneConfig) -> dict[str, Any]:
    """What of the settings is in no training configuration, for the record."""
    return {"kl_share": config.kl_share, "balance": config.balance}


class _Finetuning:
    """One run on its way."""

    def __init__(self, source: _Source, folder: MemberFolder):
        self.source, self.plan, self.folder = source, source.plan, folder.folder
        config, self.device = source.plan.config, source.device
        dtype = DTYPES[resolve_dtype(config.run.dtype, self.device)]
        step = latest_common([self.folder], remove_damaged=True) if folder.has_checkpoint else None
        state = None if step is None else load_checkpoint(self.folder, step)
        self.inputs = self._inputs(state)
        self.member = Member(self.plan, self.inputs.mean_D, self.device, dtype)
        # Of pairs of tokens, all tokens of a row have all terms here, the earlier ones too.
        self.member.objective = replace(self.member.objective, current_only=False)
        self.origin = begin_from_source(self.member, self.inputs.scale)
        self.record = new_record(self.plan, source.store, self.inputs, self.device)
        if folder.record is not None and step is not None:
            self._check_origin(folder.record)
            self.record = folder.record
        self.kl_step = self._kl_step()
        self.stepping = Single(self.member, self.kl_step)
        self.reader = BatchReader(self._stream(), self.device)
        self.batches = RowBatches(source.store, self.member, self.device)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.last: Metrics = {}
        self._alarmed = False
        if state is not None:
            self._restore(state, step or 0)
        else:
            self.record = self.record.model_copy(update=self._beginning())
        self.record.save(self.folder)

    def _inputs(self, state: dict[str, Any] | None) -> Inputs:
        if state is not None:
            return Inputs.from_state_dict(state["inputs"])
        found = Inputs.of(self.plan.config.data, self.source.store.statistics())
        factor = self.source.record.input_scale / found.scale  # the run's own units, whatever the store holds by now
        return replace(
            found,
            scale=self.source.record.input_scale,
            mean_D=found.mean_D * factor,
            spread=found.spread * factor**2,
        )

    def _check_origin(self, record: RunRecord) -> None:
        if record.origin.get("weights") != self.origin["weights"]:
            raise RunError(
                f"{self.source.config.run} has other weights than those that {self.folder} began with: give another "
                "--out, or replace it with --fresh"
            )

    def _beginning(self) -> dict[str, Any]:
        before = self.source.record
        facts = _choices(self.source.config) | {"from": before.name, "model_dtype": str(self.kl_step.model.dtype)[6:]}
        facts |= {"steps_before": before.steps, "tokens_before": before.tokens}
        return {"step": "autograd", "origin": self.origin, "finetuned": facts}

    def _kl_step(self) -> KLStep:
        """The language model, checked and verified."""
        config, known = self.source.config, self.source.store.manifest.model
        outline = outline_model(
            ModelSource(
                id=config.model or known.id,
                revision=None if config.model else known.revision,
                gguf_file=None if config.model else known.gguf_file,
                device=config.device,
                dtype=config.dtype,
            )
        )
        identity = identify_model(outline)
        if identity.fingerprint != known.fingerprint:
            raise RunError(
                f"the weights of {identity.id} are not those that {self.source.store.path} was extracted with "
                f"(fingerprint {identity.fingerprint[:12]}, the store's {known.fingerprint[:12]}): name the model it "
                "was with --model"
            )
        lm = load_language_model(outline, identity=identity)
        model, head, at = SplicedModel(lm), Head(lm), self.source.at
        if not model.is_block_output(at):
            raise RunError(
                f"{self.source.config.run} is of layer {at}, which lies inside a block of {identity.architecture}: its "
                "store does not hold the residual stream that the layers above need, so it cannot be fine-tuned"
            )
        tokens = torch.from_numpy(self.source.store.tokens(0, min(2, self.source.store.n_rows))).to(self.device).long()
        for message in model.verify(tokens, [at]):
            note(message)
        head.verify(tokens[:1], model.clean(tokens[:1], [at]).final_BTD)
        if head.note is not None:
            note(head.note)
        return KLStep(model, head, at, self.inputs.scale, config.kl_share, config.balance)

    def _stream(self) -> TokenStream:
        data = self.plan.config.data
        return TokenStream(
            self.source.store,
            [_VIEW],
            tokens_per_batch=data.batch_size,
            seed=data.seed,
            norm_limit=self.inputs.norm_limit,
            rows=self.inputs.rows,
            only=data.only,
            pin_memory=self.device.type == "cuda",
        )

    # --- training

    def run(self) -> None:
        """From the first step, or the last checkpoint, to a finished run."""
        config = self.plan.config
        steps, per_step = config.run.steps, config.data.batch_size
        note(f"layer {self.source.at}: {self.plan.name}, {steps} steps of about {format_count(per_step)} tokens")
        if self.step:
            note(f"going on from step {self.step}")
        log = MetricsLog(self.folder, ("jsonl",), from_step=self.step, config=config.model_dump(mode="json"))
        with (
            closing(log),
            interruptible() as stop,
            progress("fine-tuning 1 SAE", steps * per_step, done=self.step * per_step) as bar,
        ):
            kept = began = time.perf_counter()
            earlier = self.seconds
            while self.step < steps:
                self._train_batch(log, bar)
                self.seconds = earlier + time.perf_counter() - began
                minutes = config.run.checkpoint_minutes
                due = self.step % config.run.checkpoint_every == 0 or 0 < 60 * minutes <= time.perf_counter() - kept
                if stop.is_set():
                    self._checkpoint()
                    raise KeyboardInterrupt(
                        f"Checkpoint written at step {self.step}; the same command goes on from there."
                    )
                if due and self.step < steps:
                    self._checkpoint()
                    kept = time.perf_counter()
        with closing(open_batches(self.source.store, [config.data], self.inputs, self.device)) as fresh:
            calibrate_thresholds([self.member], fresh, self.inputs, self.device)
        self._finish()

    def _train_batch(self, log: MetricsLog, bar: Progress) -> None:
        batch = self.reader.next_batches()[_VIEW]
        x_NTD = self.inputs.prepare(batch.x_NWD, self.device)
        seen = self.batches.of(batch, x_NTD, self.step)
        config = self.plan.config.run
        logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
        self.kl_step.batch, self.kl_step.wanted = seen, logged or self.step == 0
        (update,) = self.stepping.train_step(x_NTD, [seen.partner], rows=seen.rows)
        check_finite(self.member, update, batch)
        if self.step == 0:
            facts = self.record.finetuned | {"kl_before": float(self.kl_step.kl)}
            self.record = self.record.model_copy(update={"finetuned": facts})
            self.record.save(self.folder)
        self.step, self.tokens = self.step + 1, self.tokens + seen.rows.n_tokens
        if logged:
            check_divergence(self.member, float(update.result.error), self.inputs.spread)
            self.last = self._metrics(update, x_NTD, seen.rows)
            log.write(self.step, {"tokens": self.tokens, "epoch": self.reader.epoch, **self.last})
            message = collapse(self.last, config.steps, self.step)
            if message and not self._alarmed:
                self._alarmed = True
                log.alarm(self.step, message)
                warn(f"{self.plan.name}: {message}")
            bar.show(live_table({self.plan.name: self.last}, {}, self.step))
        bar.advance(self.plan.config.data.batch_size)

    def _weight(self) -> torch.Tensor:
        assert self.kl_step.weight is not None  # noqa: S101 - after a step
        return self.kl_step.weight

    def _metrics(self, update: Update, x_NTD: torch.Tensor, rows: Any) -> Metrics:
        found = diagnose(self.member, update, x_NTD, self.inputs.mean_D.to(self.device), rows=rows)
        share, kl, weight = self.kl_step.share, float(self.kl_step.kl), float(self._weight())
        total = float(update.result.total)
        of_mse = found.get("reconstruction_share")
        found["reconstruction_share"] = None if of_mse is None else (1 - share) * of_mse
        return found | {
            "kl": kl,
            "kl_weight": share * weight,
            "kl_share": share * weight * kl / total if total else None,
        }

    # --- on disk

    def _checkpoint(self) -> None:
        check_weights(self.member)
        state = {
            "member": self.member.state_dict(),
            "stream": json.dumps(self.reader.state_dict(_VIEW)),
            "inputs": self.inputs.state_dict(),
            "kl_weight": self._weight(),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        save_checkpoint(self.folder, self.step, state)

    def _restore(self, state: dict[str, Any], step: int) -> None:
        self.member.load_state_dict(state["member"])
        self.reader.load_state_dict(json.loads(state["stream"]), _VIEW)
        self.kl_step.weight = state["kl_weight"].to(self.device)
        self.step, self.tokens, self.seconds = step, state["tokens"], state["seconds"]

    def _finish(self) -> None:
        """Weights in raw units, then the record that says so, then the checkpoints go."""
        sae = self.member.sae.rescaled(self.inputs.scale).eval()
        sae.metadata = metadata_of(self.record) | {ORIGINAL: self.source.record.name, "tcsae_tokens": self.tokens}
        sae.cpu().save(self.folder)
        cost = {"seconds": self.seconds, "peak_memory_bytes": float(peak_memory(self.device)), "members": 1.0}
        done = {"steps": self.step, "tokens": self.tokens, "finished": True, "metrics": self.last, "cost": cost}
        self.record.model_copy(update=done).save(self.folder)
        drop_checkpoints(self.folder)


def in_words(done: FinetuneSummary) -> dict[str, Any]:
    """For people, as a closing summary."""
    shown: Sequence[tuple[str, str]] = (("explained", "explained_variance"), ("L0", "l0"), ("dead", "dead_share"))
    found = [f"{name} {value:.3g}" for name, key in shown if (value := done.metrics.get(key)) is not None]
    kl = [f"{value:.4g}" for value in (done.kl_before, done.metrics.get("kl")) if value is not None]
    facts: dict[str, Any] = {"run": done.folder, "KL of a batch": " → ".join(kl), "last batch": ", ".join(found)}
    facts |= {"steps": done.steps, "tokens": format_count(done.tokens)}
    return facts if done.skipped else facts | {"time": format_duration(done.seconds)}
