"""The training loop: sample, score, mix with replay, update, sync; phases and reincarnation between steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np

from remix import checkpoint
from remix.config import MixPolicyPhase, PhaseConfig, Recipe
from remix.errors import Interrupted, TrainingError
from remix.evaluation.evaluate import evaluate, training_metrics
from remix.evaluation.exam import Exam, Question, Response, respond
from remix.merging.continual import Alignment
from remix.models.policy import Policy
from remix.replay import ReplayBuffer
from remix.rollout.sample import Sampler
from remix.tasks import PromptStream, named_apart
from remix.tracking.progress import Progress
from remix.tracking.rollout_stats import rollout_metrics, sampler_mismatch
from remix.tracking.run_log import RunLog
from remix.tracking.stopwatch import Stopwatch
from remix.training.beside import Beside
from remix.training.distributed import Cluster
from remix.training.experience import Experience
from remix.training.interruption import Interruption
from remix.training.phases import ends
from remix.training.probe import SyncProbe
from remix.training.reincarnation import reincarnate
from remix.training.shards import Shards
from remix.training.state import TrainState, to_checkpoint, whole_tensors
from remix.training.update import Updater
from remix.types import Prompt, RemoteEngine, Rollout, RolloutGroup, Sampling

A = TypeVar("A")
B = TypeVar("B")


class Sampled(NamedTuple):
    """The fresh rollouts of a step."""

    kept: list[RolloutGroup]
    dropped: list[RolloutGroup]
    """Their rewards are all equal."""
    position: int
    """Prompts taken from the stream, these included."""


@dataclass
class Trainer:
    """The parts of a run, joined; `open_trainer` makes one from a recipe."""

    recipe: Recipe
    run_dir: Path
    cluster: Cluster
    policy: Policy
    sampler: Sampler
    probe: SyncProbe
    stream: PromptStream
    exams: Sequence[Exam]
    experience: Experience
    updater: Updater
    replay: ReplayBuffer
    shards: Shards
    log: RunLog
    progress: Progress
    state: TrainState
    identity: Mapping[str, str]
    """Hashes of model and data; see `run_identity`."""
    alignment: Alignment | None = None
    interruption: Interruption = field(default_factory=Interruption)
    _ahead: Sampled | None = None
    """Of the next step, where this one has it sampled already."""

    def fit(self) -> None:
        """The steps that remain, with an evaluation before the first and after the last.

        Raises Interrupted where a signal asked for it; what was done is saved then.
        """
        self._saved_at = self._position if self.state.step else None
        self.interruption.begin()
        watch, started = Stopwatch(self.progress.stage), time.perf_counter() - self.state.seconds
        try:
            probe = self._sync(watch)
            if self.state.base_evaluation is None and self.recipe.eval.before:
                self.state.base_evaluation = self._evaluate(watch)
                self.progress.update(0, self.state.base_evaluation, self._phase.type)
            if self.state.unlogged is not None:
                self._finish(self.state.step - 1, probe | self.state.unlogged)
            self._sample_again(watch)
            for step in range(self.state.step, self.recipe.last_step):
                metrics = self._step(step)
                self.state.seconds = time.perf_counter() - started
                self._finish(step, metrics)
        except Interrupted:
            if self._position != self._saved_at:
                self.save()
            self.interruption.saved = True
            raise

    def _step(self, step: int) -> dict[str, float]:
        """Nothing that a checkpoint holds changes before the sampling is over, so that until then it may be dropped."""
        watch = Stopwatch(self.progress.stage)
        self._enter_phase(step, watch)
        phase, kl_lambda = self._phase, self.state.phase.lambda_at(step, self.recipe.kl.lambda_schedule)
        fresh, dropped = self._sample(phase, step, watch)
        replayed = self._draw(phase, step, len(fresh))
        metrics = self._describe(fresh, dropped, replayed) | {"kl/lambda": kl_lambda}
        with self._beside(phase, step, metrics, len(fresh)) as ahead:
            self.policy.begin_step(keep_precedent=self.recipe.keeps_precedent)
            with watch("anchors"):
                since = max(self.state.phase.reincarnations, default=0)
                fresh, samples = self.experience.prepare(
                    fresh, replayed, step=step, kl_lambda=kl_lambda, reference_since=since
                )
            with watch("updating"):
                learnt, trained = self.updater.run(samples, step=step, passes=phase.utd_ratio, kl_lambda=kl_lambda)
                metrics |= learnt | self._align(step, int(learnt.get("updates", 0)))
            metrics |= {"batch/left_out": metrics["batch/rollouts"] - len(samples)}
            self._store(self.experience.completed(fresh, samples, trained), dropped, metrics)
            if ahead is not None:
                self.state.step, self.state.unlogged = (
                    step + 1,
                    metrics | watch.metrics(),
                )  # should a signal end the wait
                self._ahead = self._rounds(phase, step + 1, watch, version=step, first=ahead)
                metrics |= ahead.metrics()
        metrics |= self._sync(watch)
        self.state.step = step + 1
        return metrics | watch.metrics()

    def _store(self, fresh: Sequence[RolloutGroup], dropped: Sequence[RolloutGroup], metrics: dict[str, float]) -> None:
        """What a step has sampled, to replay and to the rollout log."""
        if any(later.window for later in self.recipe.phases[self.state.phase.index :]):
            self.replay.add(fresh, self.state.step)
        self.shards.write(self.state.step, fresh, dropped)
        metrics |= {} if self.recipe.imitates else sampler_mismatch(fresh)

    def _beside(
        self, phase: PhaseConfig, step: int, metrics: Mapping[str, float], coming: int
    ) -> AbstractContextManager[Beside[list[RolloutGroup]] | None]:
        """This rank's share of the next step's first round, sampled meanwhile by the policy as this step begins.

        `coming`: groups that this step has yet to give to replay.
        """
        state = replace(self.state.phase, history=[*self.state.phase.history, dict(metrics)])
        if not self.recipe.rollout.overlap or step + 1 >= self.recipe.last_step or ends(phase, state) is not None:
            return nullcontext()
        prompts = self.stream.take(self.state.prompt_position, self._wanted(phase, step + 1, coming))
        share = self.cluster.share(named_apart(prompts, []))
        silent = Stopwatch(lambda _: None)
        engine = cast(RemoteEngine, self.sampler.engine)  # or the recipe is refused
        return Beside(lambda: self._ask(share, step + 1, step, silent), engine.abandon)

    def _sample_again(self, watch: Stopwatch) -> None:
        """In a run that goes on: what the last step had sampled beside it, by the policy as that step began."""
        step, before, phase = self.state.step, self.policy.next_precedent, self.state.phase
        begun = phase.start_step < step < self.recipe.last_step and ends(self._phase, phase) is None
        if not self.recipe.rollout.overlap or before is None or not begun:
            return
        with self.policy.acting_as(before):
            self._sync(watch)
            self._ahead = self._rounds(self._phase, step, watch, version=step - 1)
        self._sync(watch)

    def _finish(self, step: int, metrics: dict[str, float]) -> None:
        """The evaluation that is due after a step, and everything that is written then."""
        if self._due(self.recipe.eval.every):
            watch, self.state.unlogged = Stopwatch(self.progress.stage), metrics
            metrics = metrics | self._evaluate(watch) | {"time/evaluating": watch.total}
            metrics["time/step"] += watch.total
        self.state.unlogged = None
        self.state.phase.record(metrics)
        self.log.log(step, self._phase.type, metrics)
        self.cluster.track(metrics, step)
        self.progress.update(self.state.step, metrics, self._phase.type)
        best = self._note_best(metrics)
        if best or self._due(self.recipe.checkpoint.every):
            self.save()
        if self.cluster.any(self.interruption.requested, "the end of the step"):
            raise Interrupted

    def save(self) -> None:
        """A checkpoint of this moment."""
        rng = self.cluster.gather(checkpoint.rng_tensors(), "the checkpoint")
        files = self.shards.files(self.replay.versions)
        self.progress.stage("saving")
        with self.cluster.waiting("the checkpoint"):
            tensors = whole_tensors(self.state, self.policy, self.updater, keep=self.cluster.is_main)
        if self.cluster.is_main:
            whole = to_checkpoint(
                self.state, tensors, self.updater, self.replay, files, self.recipe, self.identity, rng
            )
            keep, best = self.recipe.checkpoint.keep, self.state.best_step
            checkpoint.save(self.run_dir, self.state.step, whole, keep=keep, best_step=best)
        self.cluster.barrier("the checkpoint")
        self._saved_at = self._position

    @property
    def _position(self) -> tuple[int, int, bool]:
        """Where the run is, as far as a checkpoint can tell."""
        return self.state.step, self.state.phase.index, self.state.unlogged is None

    def _note_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether this step is better than all before by the metric of `checkpoint.best`."""
        config = self.recipe.checkpoint
        value = None if config.best is None else metrics.get(config.best)
        if value is None or not np.isfinite(value):
            return False
        better = self.state.best is None or (
            value > self.state.best if config.best_is == "highest" else value < self.state.best
        )
        if better:
            self.state.best, self.state.best_step = value, self.state.step
        return better

    @property
    def _phase(self) -> PhaseConfig:
        return self.recipe.phases[self.state.phase.index]

    def _due(self, every: int) -> bool:
        """After this step? The last one counts always."""
        return self.state.step == self.recipe.last_step or (every > 0 and self.state.step % every == 0)

    def _enter_phase(self, step: int, watch: Stopwatch) -> None:
        trigger = ends(self._phase, self.state.phase)
        if trigger is not None:
            with watch("reincarnating"):
                reincarnate(self.recipe, self.policy, self.updater, self.replay, self.state)
            self.progress.message(
                f"reincarnation before step {step} ({trigger.type}): reference <- policy, now {self._phase.type}"
            )

    def _sample(self, phase: PhaseConfig, step: int, watch: Stopwatch) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """Fresh scored groups to train on, and those dropped because their rewards are all equal."""
        sampled, self._ahead = self._ahead or self._rounds(phase, step, watch, version=step), None
        kept, dropped, self.state.prompt_position = sampled
        self.state.rollouts += self.recipe.rollout.group_size * (len(kept) + len(dropped))
        rollouts = [rollout for group in (*kept, *dropped) for rollout in group.rollouts]
        if not any(rollout.sampler_logprobs.isfinite().all() for rollout in rollouts):
            raise TrainingError(
                f"step {step}: the log-probs of every response are NaN or infinite: the policy is broken. Go on from "
                "an earlier checkpoint with a lower optimizer.lr, or start from a model that is whole"
            )
        self._check_scores(step, rollouts)
        return kept, dropped

    def _wanted(self, phase: PhaseConfig, step: int, coming: int = 0) -> int:
        """Fresh groups: more than (1 - p) of the batch, where replay cannot fill the rest."""
        replayed = self.recipe.batch.prompts - self.recipe.fresh_prompts(phase)
        return self.recipe.batch.prompts - min(replayed, self.replay.available(step, phase.window) + coming)

    def _rounds(
        self,
        phase: PhaseConfig,
        step: int,
        watch: Stopwatch,
        *,
        version: int,
        first: Beside[list[RolloutGroup]] | None = None,
    ) -> Sampled:
        """All that a step needs of policy `version`, which the engine holds; `first`: where the first round is."""
        wanted, position = self._wanted(phase, step), self.state.prompt_position
        kept: list[RolloutGroup] = []
        dropped: list[RolloutGroup] = []

        def work(share: Sequence[Prompt]) -> list[RolloutGroup]:
            if first is None or kept or dropped:
                return self._ask(share, step, version, watch)
            with watch("sampling"):
                return first.result()

        for _ in range(1 + self.recipe.rollout.refill.max_rounds):
            if len(kept) == wanted:
                break
            earlier = [group.prompt.id for group in (*kept, *dropped)]
            prompts = named_apart(self.stream.take(position, wanted - len(kept)), earlier)
            position += len(prompts)
            for group in self._abandonable(work, prompts, "sampling"):
                uniform = self.recipe.drops_uniform_groups and group.uniform
                (dropped if uniform else kept).append(group)
        return Sampled(kept, dropped, position)

    def _check_scores(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Says once a step why a response could not be scored; raises TrainingError where too many could not."""
        notes = [rollout.score.note for rollout in rollouts if rollout.score is not None and rollout.score.failed]
        if not notes:
            return
        said = f"step {step}: {len(notes)} of {len(rollouts)} responses could not be scored"
        why = next(filter(None, notes), "the grader ran out of time")
        if len(notes) > self.recipe.faults.unscored * len(rollouts):
            raise TrainingError(
                f"{said} (faults.unscored {self.recipe.faults.unscored:g}), for example: {why}. Mend the reward, "
                "then go on from the last checkpoint with --resume"
            )
        self.progress.message(f"{said} and are left out, for example: {why}")

    def _ask(self, share: Sequence[Prompt], step: int, version: int, watch: Stopwatch) -> list[RolloutGroup]:
        """For a step, of policy `version`, which the engine holds. No other rank is spoken to."""
        rollout = self.recipe.rollout
        sampling = Sampling(max_tokens=rollout.max_tokens, temperature=rollout.temperature)
        return self.sampler.sample(share, sampling, rollout.group_size, version=version, step=step, watch=watch)

    def _abandonable(self, work: Callable[[Sequence[A]], list[B]], items: Sequence[A], stage: str) -> list[B]:
        """`work` over all ranks, which an interruption cuts short. Raises Interrupted on all of them alike."""

        def until_interrupted(share: Sequence[A]) -> Sequence[B | None]:
            try:
                with self.interruption.abandoning():
                    return work(share)
            except Interrupted:
                return [None] * len(share)

        own_weights = self.recipe.rollout.engine.type == "hf"
        with self.policy.whole_lm() if own_weights else nullcontext():
            results = self.cluster.map(until_interrupted, items, stage)
        done = [result for result in results if result is not None]
        if len(done) < len(items):
            raise Interrupted
        return done

    def _draw(self, phase: PhaseConfig, step: int, num_fresh: int) -> list[RolloutGroup]:
        """As many replayed groups as make up the share p beside the fresh ones that are left."""
        if not isinstance(phase, MixPolicyPhase):
            return []
        # In the whole prompts that p of the batch amounts to, so that the batch is full where nothing was dropped.
        planned_fresh = self.recipe.fresh_prompts(phase)
        planned_replayed = self.recipe.batch.prompts - planned_fresh
        rng = np.random.default_rng((self.recipe.seed, step, 1))
        return self.replay.draw(
            round(num_fresh * planned_replayed / planned_fresh),
            step=step,
            window=phase.window,
            distribution=phase.lag_distribution,
            rng=rng,
        )

    def _sync(self, watch: Stopwatch) -> dict[str, float]:
        """The policy's weights to the engine, and the proof that they arrived."""
        with watch("syncing"):
            self.sampler.engine.sync(self.policy.engine_weights(self.recipe.rollout.engine))
            return self.probe.check(self.sampler.engine, self.stream.take(0, 4))

    def _align(self, step: int, updates: int) -> dict[str, float]:
        """After a step's `updates`: the sign alignment, where one has come due."""
        self.state.updates += updates
        if self.alignment is None:
            return {}
        return self.alignment.after(self.state.updates, updates, steps_left=self.recipe.steps - step - 1)

    def evaluate(self, exams: Sequence[str] | None = None) -> dict[str, float]:
        """The policy as it is now, on the exams of these names, or all. Raises Interrupted after a signal."""
        watch = Stopwatch(self.progress.stage)
        self._sync(watch)
        return self._evaluate(watch, exams)

    def _evaluate(self, watch: Stopwatch, names: Sequence[str] | None = None) -> dict[str, float]:
        def responses(exam: Exam) -> list[Response]:
            def work(share: Sequence[Question]) -> list[Response]:
                return respond(exam, share, self.sampler.engine, self.sampler.decode, self.recipe.seed)

            return self._abandonable(work, exam.questions, "evaluating")

        with watch("evaluating"):
            chosen = [exam for exam in self.exams if names is None or exam.name in names]
            metrics = training_metrics([evaluate(exam, responses(exam)) for exam in chosen])
        self.state.evaluation = metrics
        return metrics

    def _describe(
        self, fresh: Sequence[RolloutGroup], dropped: Sequence[RolloutGroup], replayed: Sequence[RolloutGroup]
    ) -> dict[str, float]:
        """Metrics of what was sampled and mixed."""
        sampled, log = [*fresh, *dropped], self.recipe.log
        if log.completions_every and self.state.step % log.completions_every == 0:
            self.log.log_completions(self.state.step, sampled, log.completions)
        batch = self.recipe.rollout.group_size * (len(fresh) + len(replayed))
        return {
            "rollouts": self.state.rollouts,
            "rollouts/fresh": self.recipe.rollout.group_size * len(sampled),
            "batch/rollouts": batch,
            "batch/replayed": self.recipe.rollout.group_size * len(replayed),
            **rollout_metrics(sampled, log.reflection_patterns),
        }
