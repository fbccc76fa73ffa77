"""What does the device do in a step? A trace of some training steps, `trainer.profile`, for TensorBoard and Perfetto."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lra.errors import ConfigError

FOLDER = "profile"  # below a run's folder


def profiled_steps(value: object, steps: int) -> range | None:
    """The steps that "A:B" names, as a Python slice does: after A of them are done until B are; None for null.

    Raises:
        ConfigError: it is written otherwise, names no step, or steps beyond the run's `steps`.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", str(value).strip())
    if not match or not 0 <= int(match[1]) < int(match[2]) <= steps:
        raise ConfigError(
            f"trainer.profile={value} must be A:B with 0 <= A < B <= trainer.steps={steps}, the steps to trace as in a "
            f"Python slice, in quotes in a YAML file; or null"
        )
    return range(int(match[1]), int(match[2]))


class Profile:
    """Traces a run's calls from one step to another.

    Args:
        steps: those to trace; none for None.
        folder: where traces go, each in a folder of its own by date.
        say: is told where the trace is and what opens it.
    """

    def __init__(self, steps: range | None, folder: Path, say: Callable[[str], None]):
        self.steps, self.folder, self.say = steps or range(0), folder, say
        self.first: int | None = None  # step of the trace under way
        self.until = 0
        # one file for Perfetto; several processes would look for it in the same place
        self.perfetto = jax.process_count() == 1

    def end(self, step: int) -> int:
        """Where a call that begins at `step` has to end, so that the trace holds the steps asked for and no others."""
        return next(
            (edge for edge in (self.steps.start, self.steps.stop) if step < edge), sys.maxsize
        )

    @contextmanager
    def tracing(self, step: int, until: int) -> Iterator[None]:
        """Around the call of the steps `step` to `until`."""
        if step not in self.steps:
            yield
            return
        if self.first is None:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the device's work alone: 10 times smaller
            try:
                jax.profiler.start_trace(
                    self.folder, create_perfetto_trace=self.perfetto, profiler_options=options
                )
                self.first = step
            except (OSError, RuntimeError) as error:  # another trace is under way, say
                self.steps = range(0)
                self.say(f"no trace of steps {step}:{until}: {' '.join(str(error).split())}")
        with jax.profiler.TraceAnnotation("train", first=step, until=until):
            yield
        self.until = until
        if until == self.steps.stop:
            self.close()

    def close(self) -> None:
        """Write the trace, or what a run that stops early has of it."""
        if self.first is None:
            return
        steps, self.first = f"{self.first}:{self.until}", None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # a full disk, say, for which no run has to end
            self.say(f"trace of steps {steps} not written: {' '.join(str(error).split())}")
            return
        files = sorted(self.folder.glob("**/perfetto_trace.json.gz"))
        perfetto = f", or {files[-1]} at https://ui.perfetto.dev" if files else ""
        self.say(
            f"trace of steps {steps}: tensorboard --logdir {self.folder} (pip install tensorboard xprof) opens it{perfetto}"
        )
