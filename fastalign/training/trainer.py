"""`AlignTrainer`: streams and a schedule on an otherwise unchanged `transformers.Trainer`.

The Trainer's dataloader is a clock: as many ticks as there are forwards in an epoch, and nothing in them. Which
streams an optimizer step runs is a pure function of `global_step`, and so are its rows; a resumed run needs no
position. A tick holds the micro-batches that the step runs between two calls of `training_step`, which may be none
or several, of one stream or of two.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from fastalign.config import nearest
from fastalign.data.streaming import StreamedRows
from fastalign.errors import ConfigError
from fastalign.model.loading import same_formats
from fastalign.model.sharding import on_this_rank
from fastalign.streams.base import MicroBatch, Stream, gather_over_ranks, rank_and_world_size, sum_over_ranks
from fastalign.training.checkpoint import PLACES, RECORD, STATE, rotate, staged, write_text
from fastalign.training.failures import Moment, out_of_memory, stop_not_finite, stop_ruined_adapter
from fastalign.training.memory import told_out_of_memory
from fastalign.training.meter import StreamMeter
from fastalign.training.plan import total_steps
from fastalign.training.progress import show_progress
from fastalign.training.resume import TakeUp
from fastalign.training.schedule import Schedule
from fastalign.training.unreached import clear_gradients, zero_term

SETTLE_EVERY = 10  # steps; at each, the losses are read from the GPU


@dataclass
class _Work:
    """One forward and backward of an optimizer step."""

    stream: str
    micro_batch: MicroBatch
    siblings: list[MicroBatch] | None  # all of the stream's micro-batches, at the first of them
    closes_stream: bool
    opens_step: bool = False
    closes_step: bool = False


class AlignTrainer(Trainer):
    """A `transformers.Trainer` whose batches come from streams.

    Callbacks, `report_to`, checkpoints, early stopping and best-model selection work as in the parent. Differences:
    `max_steps` counts the steps of all streams, `num_train_epochs` passes over the task's rows (over the pairs under
    ``align_only``); `loss` and `grad_norm` are logged per stream (`task_loss`, `alignment_loss`, ...); `eval_loss`
    is `eval_task_loss`, or `eval_alignment_loss` where no task is trained.

    Args:
        model: a causal model with a trainable adapter.
        args: the parent's. `auto_find_batch_size` is refused.
        streams: by name; those the schedule names are trained on, all are evaluated.
        schedule: which stream runs at a step.
        retrieval: called with the model at every evaluation; gives ``{"mean": ..., "languages": ...}``, whose mean is
            logged as `eval_retrieval`.
        record: kept in every checkpoint as ``run.json``, for whoever resumes it.
        **kwargs: of the parent: processing_class, callbacks, optimizers.

    Raises:
        ConfigError: a stream of the schedule is missing, or a setting cannot work here.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        streams: Mapping[str, Stream],
        schedule: Schedule,
        retrieval: Callable[[torch.nn.Module], dict[str, Any]] | None = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        missing = [name for name in schedule.streams if name not in streams]
        if missing:
            raise ConfigError(f"schedule.mode: {schedule.mode} needs the stream {', '.join(missing)}")
        if args.auto_find_batch_size:
            raise ConfigError(
                "training.auto_find_batch_size cannot work here: a smaller batch would change the number of negatives "
                "and the schedule; lower per_device_train_batch_size or alignment.micro_batch_size instead"
            )
        measured = [name for name, stream in streams.items() if stream.can_evaluate]
        known = [*(f"{name}_loss" for name in measured), *(["retrieval"] if retrieval else [])]
        known += ["loss"] if set(measured) & {*schedule.streams} else []
        metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if args.metric_for_best_model and metric not in known:
            raise ConfigError(
                f"training.metric_for_best_model: {metric!r} is not measured{nearest(metric, known)}; there are: "
                f"{', '.join('eval_' + name for name in known)}"
            )
        options: Any = args.gradient_checkpointing_kwargs or {}
        if args.world_size > 1 and options.get("use_reentrant"):
            raise ConfigError("training.gradient_checkpointing_kwargs: use_reentrant cannot work on several ranks")
        self.streams, self.schedule, self.retrieval = dict(streams), schedule, retrieval
        self.meter = StreamMeter(args.device, scaled=args.fp16)
        self.record = record
        self._staging: Path | None = None  # where a checkpoint is being written
        self._moment: Moment | None = None  # the forward and backward that is going on
        self._kept: list[torch.Tensor | None] = []  # the first stream's gradient in a step of two
        args.max_steps = total_steps(schedule, self.streams, args)
        epoch = self.streams[schedule.streams[0]].steps_per_epoch(args.world_size)
        endless = math.isinf(epoch)  # the run is its one epoch
        self._steps_per_epoch = args.max_steps if endless else max(1, schedule.steps(math.ceil(epoch)))
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs need a launcher: threads cannot share a model that exits early
        args.ddp_find_unused_parameters = False  # zero_term uses all of them; DDP would count them twice
        kwargs["callbacks"] = [TakeUp(), self.meter, *(kwargs.get("callbacks") or [])]
        super().__init__(model=model, args=args, eval_dataset=[0], **kwargs)  # type: ignore[arg-type]
        show_progress(self)

    def get_train_dataloader(self) -> DataLoader:
        """The clock: one tick a forward of the task, for one epoch; the same on all ranks."""
        ticks = self._steps_per_epoch * self.args.gradient_accumulation_steps
        return DataLoader(range(ticks), batch_size=1, generator=torch.Generator())  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[list[_Work]], None]:
        """The work of the coming optimizer step, dealt to `num_batches` ticks; the last tick always has some."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a finished run was resumed
        if self.state.global_step % SETTLE_EVERY == 0:
            self._settle()
        for _ in range(num_batches):
            next(epoch_iterator)
        rank, world_size = rank_and_world_size()
        work: list[_Work] = []
        for name, index in self.schedule.at(self.state.global_step):
            batches = [batch.to(device) for batch in self.streams[name].micro_batches(index, rank, world_size)]
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                work.append(_Work(name, batch, batches if i == 0 else None, closes_stream=last))
        work[0].opens_step = work[-1].closes_step = True
        edges = [i * len(work) // num_batches for i in range(num_batches + 1)]
        return [work[start:end] for start, end in pairwise(edges)], None

    def training_step(
        self, model: torch.nn.Module, inputs: list[_Work], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one tick. Returns the sum of its losses, detached."""
        model.train()
        self._optimizer_mode("train")
        total = torch.zeros((), device=self.args.device)
        number = self.state.global_step + 1
        for work in inputs:
            stream = self.streams[work.stream]
            self._moment = Moment(stream, work.micro_batch, number, _allocated(self.args.device))
            with self.meter.timing(work.stream, number, opens_step=work.siblings is not None) as step:
                if work.opens_step:
                    clear_gradients(model)
                if work.siblings is not None:
                    with self.compute_loss_context_manager():
                        stream.begin_step(model, work.siblings)
                with self._synchronized(model, work is inputs[-1]):
                    with self.compute_loss_context_manager():
                        loss = stream.loss(model, work.micro_batch)
                    step.add(loss, work.micro_batch)
                    loss = loss * stream.weight
                    total += loss.detach()
                    self._backward(loss + zero_term(model) if work.opens_step or work.closes_step else loss)
            if work.closes_stream:
                self._measure_gradient(model, work)
        self._moment = None
        return total

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's. RunError where memory runs out or a loss is no longer finite."""
        with told_out_of_memory(lambda why: out_of_memory(why, self._moment, self.model, self.args)):
            return super().train(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss of every stream and retrieval; the arguments are the parent's, `eval_dataset` is not used."""
        start = time.perf_counter()
        model: Any = self.model_wrapped
        training = model.training
        model.eval()
        self._optimizer_mode("eval")
        metrics: dict[str, float] = {}
        for stream in self.streams.values():
            metrics.update(stream.evaluate(model, self.args.device))
        if self.retrieval is not None:
            metrics["eval_retrieval"] = self.retrieval(model)["mean"]
        model.train(training)
        for name in self.schedule.streams:
            if f"eval_{name}_loss" in metrics:
                metrics["eval_loss"] = metrics[f"eval_{name}_loss"]
                break
        metrics["eval_runtime"] = time.perf_counter() - start
        metrics = {metric_key_prefix + name.removeprefix("eval"): value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's, with every stream's own figures; with two streams the mixed ones are left out."""
        if self.is_in_train and ("loss" in logs or "train_loss" in logs):
            if len(self.schedule.streams) > 1:
                logs = {k: v for k, v in logs.items() if k not in ("loss", "train_loss", "grad_norm")}
            self._settle()
            logs = {**self.meter.report(), **logs}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the parent's, but a checkpoint is whole or not there, and holds no numbers that are not finite."""
        self._settle()
        self.require_finite_adapter()
        name = f"checkpoint-{self.state.global_step}"
        with staged(self._folder, name) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            best = self._folder / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best.name == name or best.exists()):  # not where it was, or is written
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / STATE))
                if places := self._places():
                    write_text(staging / name / PLACES, json.dumps(places) + "\n")
                if self.record is not None:
                    write_text(staging / name / RECORD, json.dumps(self.record, indent=2) + "\n")
        rotate(self._folder, self.args.save_total_limit, name, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(self._folder / name))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with warnings.catch_warnings():  # peft may not ask the hub whether the vocabulary has grown: it has not
            warnings.filterwarnings("ignore", message="Could not find a config file")
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        model: Any = self.model
        with same_formats(model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        model: Any = self.model
        with same_formats(model):
            super()._load_best_model()

    def _load_callback_state(self) -> None:
        super()._load_callback_state()  # puts new objects in the place of the callbacks
        handler = self.callback_handler
        if self.meter not in handler.callbacks:
            others = [callback for callback in handler.callbacks if not isinstance(callback, StreamMeter)]
            handler.callbacks = [self.meter, *others]  # which takes up its history itself

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Under `save_strategy: best` the answer decides whether to save: also where an interrupt asked for it.
        return super()._determine_best_metric(metrics, trial) or self.control.should_save

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it has not been moved to its place yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _settle(self) -> None:
        """Book what was done, and stop where it was not finite."""
        found = self.meter.settle(self.args.device)
        if found is None:
            return
        places = gather_over_ranks([self.streams[found.stream].where(row) for row in found.rows])
        raise stop_not_finite(found, places, self._folder)

    def require_finite_adapter(self) -> None:
        """RunError where an update has ruined the weights, though the loss before it was finite: they are not saved."""
        model: Any = self.model
        parts = [on_this_rank(p) for p in model.parameters() if p.requires_grad]
        largest = [part.abs().amax().float() for part in parts if part.numel()]
        ruined = float(bool(largest) and not bool(torch.stack(largest).isfinite().all()))
        if sum_over_ranks([ruined], self.args.device)[0]:  # shards differ, but all ranks have to stop
            step = self.state.global_step
            streams = " and ".join(name for name, _ in self.schedule.at(step - 1))
            raise stop_ruined_adapter(streams, step, self._folder)

    def _places(self) -> dict[str, Any]:
        """Of the streamed rows, from where to read on after the steps so far."""
        counts = self.schedule.counts(self.state.global_step)
        positions = {name: n * self.args.world_size * self.streams[name].rows_per_step for name, n in counts.items()}
        rows = {name: self.streams[name].train for name in counts}
        return {name: part.place(positions[name]) for name, part in rows.items() if isinstance(part, StreamedRows)}

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or ".")

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: a forward that stops early has no simple formula."""
        return 0

    def _track_num_input_tokens(self, inputs: list[_Work]) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(sum(work.micro_batch.tokens for work in inputs), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))  # type: ignore[arg-type]

    def _optimizer_mode(self, mode: str) -> None:
        switch = getattr(self.optimizer, mode, None)  # schedule-free optimizers have modes, as modules do
        if callable(switch):
            switch()

    def _backward(self, loss: torch.Tensor) -> None:
        kwargs = {}
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["scale_wrt_gas"] = False  # streams scale their losses themselves
        self.accelerator.backward(loss, **kwargs)

    @contextlib.contextmanager
    def _synchronized(self, model: torch.nn.Module, last_of_tick: bool) -> Iterator[None]:
        """Only the last backward of a step exchanges gradients, and steps DeepSpeed's optimizer.

        The Trainer says which tick is the step's last; within it that is the last piece of work.
        """
        state = self.accelerator.gradient_state
        due = state.sync_gradients
        if last_of_tick or not due:
            yield
            return
        state._set_sync_gradients(False)
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        try:
            with contextlib.nullcontext() if deepspeed else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(due)

    def _measure_gradient(self, model: torch.nn.Module, work: _Work) -> None:
        """Gradient norm of the stream that just closed, before clipping.

        Two streams in one step share `.grad`, so the first one's is kept aside and subtracted. On several ranks the
        first one's is not exchanged yet, and DeepSpeed keeps no `.grad`: there only steps of one stream are measured.
        """
        alone = len(self.schedule.at(self.state.global_step)) == 1
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            norm = model.get_global_grad_norm() if alone else None  # type: ignore[operator]
            if norm is not None:
                self.meter.grad_norm(work.stream, norm)
            return
        if not alone and rank_and_world_size()[1] > 1:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        if not alone and not work.closes_step:
            self._kept = [None if gradient is None else gradient.clone() for gradient in gradients]
        elif not alone:
            pairs = zip(gradients, self._kept, strict=True)
            gradients = [g if g is None or kept is None else g - kept for g, kept in pairs]
            self._kept = []
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0
        self.meter.grad_norm(work.stream, _norm(gradients) / scale)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _norm(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([tensor for tensor in tensors if tensor is not None])
