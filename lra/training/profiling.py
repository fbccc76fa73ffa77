"""Traces of some training steps (`trainer.profile`) for TensorBoard and Perfetto."""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lra.config.rules import format_value
from lra.errors import ConfigError

log = logging.getLogger(__name__)


def profiled_steps(value: object, steps: int) -> range | None:
    """Parses "A:B" to the steps that it selects as a Python slice; None for null.

    Raises:
        ConfigError: the form is wrong, or the steps are empty or exceed the run's `steps`.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", str(value).strip())
    if not match or not 0 <= int(match[1]) < int(match[2]) <= steps:
        raise ConfigError(
            f"trainer.profile={format_value(value)} must be A:B with 0 <= A < B <= "
            f"trainer.steps={steps}, the steps to trace as a Python slice, in quotes in a YAML "
            f"file; or null"
        )
    return range(int(match[1]), int(match[2]))


class Profile:
    """Traces a range of training steps. A trace that fails costs a warning and never ends the run.

    Args:
        steps: steps to trace; None for no trace.
        folder: each trace is written to a subfolder named by date.
        report: called with one line that says where the trace is and how to open it.
    """

    def __init__(self, steps: range | None, folder: Path, report: Callable[[str], None]):
        self.steps, self.folder, self.report = steps or range(0), folder, report
        self.first: int | None = None  # first step of the running trace
        self.until = 0
        # one file for Perfetto; several processes would write the same file
        self.perfetto = jax.process_count() == 1

    def next_boundary(self, step: int) -> int:
        """Returns the step at which a call from `step` on has to end, so that a trace is exact."""
        return next(
            (edge for edge in (self.steps.start, self.steps.stop) if step < edge), sys.maxsize
        )

    @contextmanager
    def trace(self, step: int, until: int) -> Iterator[None]:
        """Traces a call that trains from `step` to `until`, if the steps are selected."""
        if step not in self.steps:
            yield
            return
        if self.first is None:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # ten times smaller without the Python stacks
            try:
                jax.profiler.start_trace(
                    self.folder, create_perfetto_trace=self.perfetto, profiler_options=options
                )
                self.first = step
            except (OSError, RuntimeError) as error:  # for example another running trace
                self.steps = range(0)
                log.warning(f"no trace of steps {step}:{until}: {' '.join(str(error).split())}")
        with jax.profiler.TraceAnnotation("train", first=step, until=until):
            yield
        self.until = until
        if until == self.steps.stop:
            self.close()

    def close(self) -> None:
        """Writes the running trace, if any, also when the run stops before its end."""
        if self.first is None:
            return
        steps, self.first = f"{self.first}:{self.until}", None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # for example a full disk
            log.warning(f"trace of steps {steps} not written: {' '.join(str(error).split())}")
            return
        files = sorted(self.folder.glob("**/perfetto_trace.json.gz"))
        perfetto = f", or {files[-1]} at https://ui.perfetto.dev" if files else ""
        self.report(
            f"trace of steps {steps}: tensorboard --logdir {self.folder} "
            f"(pip install tensorboard xprof) opens it{perfetto}"
        )
