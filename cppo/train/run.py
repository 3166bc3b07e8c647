"""A run in its folder: how it begins or resumes, what it saves, and how it ends early."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from cppo.train import fingerprint, policy, weights
from cppo.train.checkpoint import (
    PARTIAL,
    check_files,
    incomplete,
    last_checkpoint,
    measure,
    read_state,
    write_checkpoint,
)
from cppo.train.draws import QuestionDraws
from cppo.train.journal import Journal
from cppo.train.output_dir import Claim, claim_output_dir, has_lock, writing_to
from cppo.train.policy import Policy
from cppo.train.processes import Processes
from cppo.train.progress import RunLog
from cppo.train.run_options import check_options, run_options
from cppo.train.sealed import CheckpointError, read_tensors, write_tensors
from cppo.train.started import started
from cppo.train.stopping import Stopping


class Run:
    """The state of a run between two steps, and the folder that keeps it.

    Args:
        policy: what is trained.
        questions: where the run is in its data.
        trained_on: names data and rewards in words; a resumed run compares them.
        metric: the evaluation metric that "best" means, if a row of metrics has it.
    """

    def __init__(
        self,
        policy: Policy,
        questions: QuestionDraws,
        processes: Processes,
        log: RunLog,
        *,
        trained_on: Callable[[], dict[str, Any]],
        metric: Callable[[dict[str, Any]], float | None],
    ) -> None:
        self.policy, self.questions, self.processes, self.log = policy, questions, processes, log
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}
        """Texts that the run writes into its folder when it begins."""
        self.stopping = Stopping(is_main=processes.is_main)
        self.journal = Journal()
        """The pieces of the step that is running."""
        self.is_running = False
        self._is_reported = False  # how it ended
        self._interrupted: Journal | None = None
        self._describe, self._metric = trained_on, metric
        self._folder, self._lock = Path(policy.config.output_dir), ExitStack()
        self._best: float | None = None
        self._saved: int | None = None  # the step of the last checkpoint
        self._saved_at, self._save_failed = time.monotonic(), False

    # Begin or resume

    def start(self, resume_from: str | Path | None, overwrite: bool) -> None:
        """Claims the folder, takes over the state of a checkpoint, and writes the first files.

        Raises: ValueError, before anything is removed, for a fresh start of what was trained.
        """
        self._trained_on  # noqa: B018  (before anybody edits a reward's file)
        self._lock = ExitStack()
        claim = self.processes.of_first(lambda: self._claim(resume_from, overwrite))
        start = claim.start
        if start is None and (self.step or self.policy.optimizer.state):
            # What the folder holds would be removed, and nothing begins with a trained model.
            raise ValueError(
                f"cppo.CPPOTrainer: this trainer has trained already, up to step {self.step}: "
                "train(resume_from='auto') goes on from its newest checkpoint, a new CPPOTrainer "
                "begins anew"
            )
        seal = self.processes.together(lambda: self._resume(start)) if start else None
        self.processes.must_agree({"checkpoint's checksum": seal, **self._shared()})
        self._folder, self.is_running, self._is_reported = claim.folder, True, False
        self.processes.of_first(lambda: self._begin(claim))
        for model in filter(None, (self.policy.model, self.policy.reference)):
            self.processes.same_weights(model)
        self.policy.version += 1  # an engine may have those of before
        self.journal = self._interrupted or Journal(self.step, self.questions.position)
        self._saved_at = time.monotonic()

    def end(self) -> None:
        """Writes the report, and gives the folder free for another run."""
        try:
            self.log.flush()
            self._last_report()
        finally:
            self.is_running = False
            self._lock.close()

    def options(self) -> dict[str, Any]:
        """Options, data and rewards, as trackers can show them."""
        return {
            name: value if isinstance(value, (int, float)) else str(value)
            for name, value in {**self._options, **self._trained_on}.items()
        }

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        return run_options(self.policy.config, self.processes.size)

    @functools.cached_property
    def _trained_on(self) -> dict[str, Any]:
        return self._describe()

    def _shared(self) -> dict[str, Any]:
        """What every process must have alike.

        The first process alone writes, so that only its folder counts; a reward may well know on
        which process it is.
        """
        shared = {**self._options, **self._trained_on}
        for name in ("output_dir", "rewards"):
            shared.pop(name)
        named = self.policy.model.named_parameters()
        shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in named]
        shared["model's parameters"] = fingerprint.of_text(shapes)
        shared.setdefault("eval_dataset", None)
        return shared

    def _claim(self, resume_from: str | Path | None, overwrite: bool) -> Claim:
        claim = claim_output_dir(
            self.policy.config.output_dir,
            resume_from,
            overwrite=overwrite,
            writes_config="config.yaml" in self.files,
            ways="train(resume_from='auto') goes on with it, train(overwrite=True) removes "
            "it, another output_dir keeps both",
        )
        self._lock.callback(claim.lock())
        for path in incomplete(claim.folder):
            self.log.say(f"{path} is left alone: it is half copied (it has no trainer.json)")
        return claim

    def _begin(self, claim: Claim) -> None:
        """Writes the first files of the run, after everything was checked."""
        claim.clear()
        with writing_to(claim.folder):
            options = {**self._options, **self._trained_on}
            start = started(self.policy.model, self.processes.size, options)
            start = {"step": self.step, **start}
            goes_on = bool(claim.start or self.history)  # stopped in step 1, it has no history
            self.log.restart(self.history, self.step, start, goes_on=goes_on)
            for name, text in self.files.items():
                (claim.folder / name).write_text(text, encoding="utf-8")

    def _resume(self, path: Path) -> str | None:
        """Takes over the state of a checkpoint; returns the checksum of all that it holds."""
        # One process of a machine reads all files, the others compare what is quick to compare.
        summary = check_files(path, contents=self.processes.is_local_main)
        state = read_state(path)
        changes = check_options(path, self._options, self._trained_on)
        if changes and summary.get("unfinished"):
            raise ValueError(
                f"cppo.CPPOTrainer: the run was stopped within a step, so that {path} must be "
                f"resumed with its data and rewards, changed: {', '.join(changes)}; an earlier "
                "checkpoint can be resumed with changes"
            )
        for change in changes:
            self.log.say(f"resumed although it changed: {change}")
        weights.load_weights(self.policy.model, path)
        optimizer = self.policy.optimizer
        optimizer.load_state_dict(state["optimizer"])
        policy.restore_schedule(self.policy.scheduler, state["scheduler"])
        self.step, self.history = state["step"], state["history"]
        self.questions.position = state["position"]
        # The best so far of another metric, or of other questions, is none to compare with.
        now = {"options": {**self._options, **self._trained_on}}
        self._best = state["best"] if measure(summary) == measure(now) else None
        self._saved, self._interrupted = self.step, None
        within = ""
        if summary.get("unfinished"):
            self._take_up(read_tensors(path / f"journal-{self.processes.rank}.pt"))
            within = f", within step {self.step + 1}"
        self.log.say(f"resumed from {path} at step {self.step}{within}")
        return summary.get("checksum")

    def _take_up(self, state: dict[str, Any]) -> None:
        """Goes on with the step in which a run was stopped."""
        self._interrupted = Journal.restored(state, self.stopping)
        for p, gradient in zip(self.policy.parameters, state["gradients"], strict=True):
            p.grad = None if gradient is None else gradient.to(p.device)

    # Steps

    def begin_step(self) -> Journal:
        """The journal of the next step, or that of a step which was stopped."""
        if self._interrupted is None:
            self.policy.optimizer.zero_grad(set_to_none=True)  # of a step that was broken off
        new = Journal(self.step, self.questions.position, self.stopping)
        self.journal, self._interrupted = self._interrupted or new, None
        return self.journal

    def record(self, row: dict[str, Any], *, show: bool) -> None:
        """Keeps a row of metrics, and writes it down."""
        if self.processes.is_main:
            with suppress(ValueError):  # the next checkpoint says what is wrong
                self._keep_folder()
        self.history.append(row)
        self.log.metrics(row, show=show)

    def finish_step(self, metrics: dict[str, Any], is_last: bool) -> None:
        """Writes report and checkpoint if they are due; ends the run if it was asked to stop."""
        config = self.policy.config
        if not is_last and config.report_every and self.step % config.report_every == 0:
            self._report(is_running=True)
        self.journal = Journal(self.step, self.questions.position)
        age = time.monotonic() - self._saved_at
        told = self.processes.gather((age, self.stopping.signal))
        is_old = 0 < 60 * config.save_minutes <= told[0][0]
        is_due = config.save_every > 0 and self.step % config.save_every == 0
        if self._improved(metrics) or is_last or is_due or is_old or self._save_failed:
            self._try_to_save(is_last)
        if is_last:
            self._last_report()  # while signals are heard
        if any(heard for _, heard in told) and not is_last:
            self.end_early()

    def _improved(self, metrics: dict[str, Any]) -> bool:
        value = self._metric(metrics)
        if value is None or (self._best is not None and value <= self._best):
            return False
        self._best = value
        return True

    def end_early(self) -> NoReturn:
        """Saves what there is, the step that is running included, and ends the run.

        Raises: KeyboardInterrupt for SIGINT, SystemExit(143) for SIGTERM.
        """
        journal = self.journal
        self.step, self.questions.position = journal.step, journal.position
        heard = [one for one in self.processes.gather(self.stopping.signal) if one is not None]
        failure = ""
        try:
            if any(self.processes.gather(not journal.is_empty)):
                self._save_journal(journal)
            elif self.step > 0 and self._saved != self.step:
                self.save()
        except ValueError as error:  # a full disk, for example
            failure = f"{error}; "
        # Before any process ends: a launcher then kills the others.
        self.processes.of_first(self._last_report)
        path = self.processes.of_first(lambda: last_checkpoint(self.policy.config.output_dir))
        words = f"{failure}the newest checkpoint is {path or 'none: nothing was done yet'}"
        self.log.say(f"stopped by {heard[0].name}; {words}")
        if signal.SIGTERM in heard:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(words)

    def gather_whole(self, value: list[Any]) -> list[list[Any]]:
        """An exchange between processes, which a signal must not break off on one of them."""
        with self.stopping.pausing():
            return self.processes.gather(value)

    def _last_report(self) -> None:
        """Writes how the run ended, once."""
        if not self._is_reported:
            self._is_reported = True
            self._report(is_running=False)

    def _report(self, *, is_running: bool) -> None:
        """Writes report.html from the run's files, on the first process. It ends no run."""
        if not (self.is_running and self.processes.is_main and self.history):
            return
        from cppo.report import write_report

        try:
            write_report(self._folder, is_running=is_running)
        except Exception as error:  # a full disk, or a row that no page can show
            words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            path = self._folder / "report.html"
            self.log.say(f"{path} cannot be written ({words}); the run goes on", style="bold red")

    # Save

    def save(self) -> Path | None:
        """Writes everything that resuming needs, atomically; returns the folder. Collective.

        Raises: CheckpointError, on every process, if it could not be written.
        """

        def written() -> Path | CheckpointError:
            try:
                return self._write()
            except CheckpointError as error:  # returned, it keeps its kind on every process
                return error

        path = self.processes.of_first(written)
        if isinstance(path, CheckpointError):
            raise path
        self._saved, self._saved_at = self.step, time.monotonic()
        return path

    def _try_to_save(self, is_last: bool) -> None:
        """Writes a checkpoint; if that fails, because the disk is full for example, goes on."""
        try:
            self.save()
            self._save_failed = False
        except CheckpointError as error:
            if is_last:
                raise
            self.log.say(f"{error}; tried again after the next step", style="bold red")
            self._save_failed = True
            self._best = None  # it may have been this one, of which no checkpoint is left

    def _save_journal(self, journal: Journal) -> None:
        """Writes a checkpoint in the middle of a step, with the journal of every process."""
        rank, folder = self.processes.rank, self._folder
        own = folder / f".journal-{rank}{PARTIAL}"
        gradients = [p.grad for p in self.policy.parameters]
        try:
            self.processes.of_first(self._keep_folder)
            self.processes.together(lambda: write_tensors(journal.state(gradients), own))
            names = range(self.processes.size)
            files = {f"journal-{i}.pt": folder / f".journal-{i}{PARTIAL}" for i in names}
            self.processes.of_first(lambda: self._write(files))
        finally:
            own.unlink(missing_ok=True)

    def _keep_folder(self) -> None:
        """Makes the run's folder again, if somebody has removed it."""
        if self.is_running and not has_lock(self._folder):
            self.log.say(f"{self._folder} was removed during the run: it is made again")
            self._lock.close()
            claim = Claim(self._folder)
            self._lock.callback(claim.lock())
            self._begin(claim)

    def _write(self, journals: Mapping[str, Path] | None = None) -> Path:
        self._keep_folder()
        self.log.flush()
        own, config = self.policy, self.policy.config
        optimizer = own.optimizer.state_dict()
        state = {
            "step": self.step,
            "position": self.questions.position,
            "best": self._best,
            "optimizer": optimizer,
            "scheduler": own.scheduler.state_dict(),
            "history": self.history,
        }
        measured = self.history and journals is None
        summary = {
            "metric": self._metric(self.history[-1]) if measured else None,
            "options": {**self._options, **self._trained_on},
            "unfinished": journals is not None,
        }
        return write_checkpoint(
            config.output_dir,
            self.step + (journals is not None),
            lambda folder: weights.save_model(own.model, own.processor, folder),
            state,
            summary,
            config.keep_checkpoints,
            expected_bytes=weights.saved_bytes(own.model, optimizer),
            files=journals or {},
        )
