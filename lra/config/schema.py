"""Declares every key of the harness: valid values, a line of help, and what the key affects.

Defaults are in conf/. Tasks, models and backbones validate the arguments of their constructors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lra.config.rules import (
    DURATION,
    OPTIONAL_PATTERN,
    SWITCH,
    WORDS,
    ParameterGroups,
    Rule,
    choice,
    count,
    described,
    format_value,
    must_have,
    number,
    text,
)
from lra.errors import ConfigError

# What another value of a key changes, from most to least.
Effect = Literal[
    "result",  # what is computed: another configuration in a table
    "speed",  # speed or display: another run folder, the same configuration in a table
    "start",  # one start of a run: the same run folder, so that a resumed run may change it
    "process",  # one process of a run: processes of the same run may differ
]

# Keys that have a new name, with the subkeys of each.
RENAMED = {"task.budget": "task.hparams", "model.budget": "model.param_count"}


@dataclass(frozen=True)
class Key:
    """One key of the harness.

    Attributes:
        valid: its valid values.
        affects: what another value changes.
        help: one line.
        in_eval: whether `lra eval` may override the recorded value.
    """

    valid: Rule
    affects: Effect
    help: str
    in_eval: bool = False


# fmt: off
KEYS: Mapping[str, Key] = {
    "seed": Key(  # JAX would silently take it modulo 2^32
        number("[0, 4294967295]", whole=True), "result",
        "Seed of the parameters, of the batch order and of dropout.",
    ),
    "resume": Key(
        choice("never", "auto"), "start",
        "never: refuse a folder that holds a run; auto: continue it from its newest checkpoint.",
    ),
    "tuning_runs": Key(
        count(), "start",
        "Number of runs behind the choice of these settings; tables show it beside the score.",
    ),
    "output.root": Key(
        text("the path of a folder"), "process",
        "Folder of the runs: ROOT/TASK/MODEL/PROTOCOL-sSEED-HASH, with the hash of the config.",
    ),
    "data.root": Key(
        text("the path of a folder"), "process",
        "Folder of the publishers' files and of the prepared data; $LRA_DATA sets the default.",
        in_eval=True,
    ),
    "data.download": Key(
        SWITCH, "start", "Whether to download a publisher's files that are missing.", in_eval=True,
    ),
    "data.allow_partial": Key(
        SWITCH, "result",
        "Whether to accept fewer examples than the task defines; the record is marked as partial.",
        in_eval=True,
    ),
    "data.placement": Key(
        choice("auto", "device", "host"), "start",
        "device: all data on the accelerator; host: prefetched batches; auto: device if it fits.",
    ),
    "task.hparams": Key(
        described("a mapping"), "result",
        "Customary sizes of the task, the defaults of backbone.*, trainer.* and model.*.",
    ),
    "task.sizes.train": Key(count(), "result", "Number of training examples."),
    "task.sizes.val": Key(count(), "result", "Number of validation examples."),
    "task.sizes.test": Key(count(), "result", "Number of test examples."),
    "model.recipe": Key(
        described("a mapping"), "result",
        "The block and the learning rates of the model's paper, the defaults of backbone.* and "
        "optim.*.",
    ),
    "model.param_count": Key(
        described("200k, 1.5M, 200000, lru (as many as that model), 200k+-5%, or null"), "start",
        "Number of parameters from which backbone.width is chosen (docs/param_count.md).",
    ),
    "protocol.name": Key(
        text("a word"), "result", "Name of the protocol; tables never mix two in one row.",
    ),
    "protocol.inputs": Key(
        described("lra2020 or s4"), "result", "Tokenization and lengths of the inputs.",
    ),
    "protocol.validation": Key(
        described("train or test"), "result",
        "Source of the validation split if the publisher has none: a part of train, or test.",
    ),
    "protocol.shuffle": Key(
        SWITCH, "result",
        "Whether to shuffle files (with a fixed seed) before they are divided into splits.",
    ),
    "protocol.pair_head": Key(
        described("interact or concat"), "result",
        "Input of the head of a pair: interact [u, v, u-v, u*v] or concat [u, v].",
    ),
    "protocol.select": Key(
        choice("best", "last"), "result",
        "Weights scored on test: those with the best validation accuracy, or the last.",
    ),
    "backbone.depth": Key(count(), "result", "Number of blocks."),
    "backbone.width": Key(count(), "result", "Width D of the residual stream."),
    "backbone.dropout": Key(number("[0, 1)"), "result", "Dropout rate inside the blocks."),
    "backbone.embedding_dropout": Key(
        number("[0, 1)"), "result", "Dropout rate after the embeddings and their positions.",
    ),
    "backbone.norm": Key(
        described("batch, layer, rms or none"), "result", "Normalization of each block.",
    ),
    "backbone.norm_position": Key(
        described("pre or post"), "result",
        "Normalization before the mixer, or after the residual sum.",
    ),
    "backbone.norm_momentum": Key(
        number("[0, 1)"), "result", "Momentum of the running statistics of batch norm.",
    ),
    "backbone.final_norm": Key(SWITCH, "result", "One more normalization before pooling."),
    "backbone.activation": Key(
        described("none, gelu, relu or silu"), "result", "Activation after the mixer.",
    ),
    "backbone.glu": Key(
        described("full, half1, half2 or none"), "result",
        "Gated linear unit after the activation.",
    ),
    "backbone.mlp": Key(
        described("none, gelu, relu, silu or swiglu"), "result",
        "MLP of a second residual branch, as in a Transformer.",
    ),
    "backbone.mlp_ratio": Key(
        number("(0, inf)"), "result", "Hidden width of the MLP divided by D.",
    ),
    "backbone.pool": Key(
        described("mean, last or cls"), "result",
        "Pooling over the positions; cls adds a class token.",
    ),
    "backbone.head": Key(
        described("linear or mlp"), "result",
        "Classification head; mlp has one hidden layer of width mlp_ratio * D. Pairs use "
        "pair_head.",
    ),
    "backbone.pair_head": Key(
        described("interact or concat"), "result", "See protocol.pair_head, its default.",
    ),
    "backbone.positions": Key(
        described("none, learned, sinusoidal or rotary"), "result",
        "Position embedding; rotary belongs to the mixer, the others are added to the embeddings.",
    ),
    "backbone.precision": Key(
        described("float32, tf32 or bf16"), "result", "See trainer.precision, its default.",
    ),
    "backbone.remat": Key(
        described("none, block, dots or a policy of JAX"), "speed",
        "See trainer.remat, its default.",
    ),
    "optim.lr": Key(number("(0, inf)"), "result", "Peak learning rate."),
    "optim.weight_decay": Key(
        number("[0, inf)"), "result", "Decoupled weight decay of the parameters in no group.",
    ),
    "optim.b1": Key(number("[0, 1)"), "result", "Decay rate of Adam's first moment."),
    "optim.b2": Key(number("[0, 1)"), "result", "Decay rate of Adam's second moment."),
    "optim.eps": Key(number("(0, inf)"), "result", "Epsilon in Adam's denominator."),
    "optim.warmup": Key(
        number("[0, 1]"), "result", "Length of the linear warm-up as a fraction of all steps.",
    ),
    "optim.lr_start": Key(
        number("[0, inf)"), "result", "Learning rate at the start of the warm-up.",
    ),
    "optim.lr_end": Key(
        number("[0, inf)"), "result",
        "Final learning rate of cosine and linear; lower bound of plateau.",
    ),
    "optim.schedule": Key(
        choice("cosine", "linear", "rsqrt", "constant", "plateau"), "result",
        "Schedule after the warm-up; rsqrt is lr * sqrt(warm-up steps / step).",
    ),
    "optim.plateau.metric": Key(
        choice("accuracy", "loss"), "result",
        "Validation metric of schedule=plateau, which follows PyTorch's ReduceLROnPlateau.",
    ),
    "optim.plateau.factor": Key(
        number("(0, 1)"), "result", "Factor by which plateau lowers the learning rate.",
    ),
    "optim.plateau.patience": Key(
        number("[0, inf)", whole=True), "result",
        "Number of evaluations without an improvement before plateau lowers the rate.",
    ),
    "optim.plateau.threshold": Key(
        number("[0, 1)"), "result", "Smallest relative change that counts as an improvement.",
    ),
    "optim.ema": Key(
        number("(0, 1)", None), "result",
        "Decay of the moving average of the weights, which is evaluated, selected and saved.",
    ),
    "optim.label_smoothing": Key(
        number("[0, 1)"), "result", "Label smoothing of the training loss.",
    ),
    "optim.clip": Key(
        number("(0, inf)", None), "result", "Largest global norm of the gradient.",
    ),
    "optim.groups": Key(
        ParameterGroups(), "result",
        "Parameter groups by path, such as blocks/0/mixer/m_y; the first match wins.",
    ),
    "optim.no_decay": Key(
        OPTIONAL_PATTERN, "result", "Paths of parameters in no group that have no weight decay.",
    ),
    "trainer.steps": Key(count(), "result", "Number of optimizer steps."),
    "trainer.batch_size": Key(
        count(), "result", "Examples of one step, over all devices and micro-batches.",
    ),
    "trainer.micro_batch": Key(
        count("auto", None), "result",
        "Examples of one forward and backward pass, a divisor of batch_size; null: batch_size; "
        "auto: the largest that fits.",
    ),
    "trainer.remat": Key(
        choice(
            *("none", "block", "dots", "everything_saveable", "nothing_saveable"),
            *("dots_saveable", "dots_with_no_batch_dims_saveable"),
        ), "speed",
        "Rematerialization of each block in the backward pass: block: all; dots: all but products "
        "with weights; or a policy of jax.checkpoint_policies.",
    ),
    "trainer.precision": Key(
        choice("float32", "tf32", "bf16"), "result",
        "Precision of the blocks; with bf16, parameters, statistics, states, spectra and losses "
        "stay float32.",
    ),
    "trainer.devices": Key(
        count(None), "start", "Number of devices of each process; null: all.",
    ),
    "trainer.distributed": Key(
        described("null, auto or {coordinator: HOST:PORT, num_processes: N, process_id: I}"),
        "process", "Several processes of one run; auto reads SLURM, Open MPI or a TPU pod.",
    ),
    "trainer.distributed_timeout": Key(
        count(), "start", "Seconds in which all processes have to connect.",
    ),
    "trainer.deterministic": Key(
        SWITCH, "speed", "Whether to use only GPU operations that repeat bit for bit; slower.",
    ),
    "trainer.eval_every": Key(
        count(None), "result", "Steps between evaluations; null: a twentieth of all steps.",
    ),
    "trainer.early_stopping": Key(
        count(None), "result",
        "Number of evaluations without a better validation accuracy that ends a run; null: never.",
    ),
    "trainer.checkpoint_every": Key(
        count(None), "speed", "Steps between checkpoints; null: eval_every.",
    ),
    "trainer.log_every": Key(
        count(None), "speed",
        "Steps averaged in one line of metrics.jsonl; null: a hundredth of all steps.",
    ),
    "trainer.eval_batch_size": Key(
        count(), "speed", "Examples of one evaluation batch.", in_eval=True,
    ),
    "trainer.eval_examples": Key(
        count(None), "result",
        "Examples of validation and of test that are scored; null: all; a number marks the record "
        "as partial.",
    ),
    "trainer.train_eval_examples": Key(
        count(), "result", "Training examples on which the selected weights are scored.",
    ),
    "trainer.first_loss_tolerance": Key(
        number("(1, inf)", None), "speed",
        "Factor between the first loss and log(classes) above which a run warns; null: never.",
    ),
    "trainer.chance_after": Key(
        number("[0, 1]", None), "speed",
        "Fraction of the steps after which validation accuracy at chance is a warning; null: "
        "never.",
    ),
    "trainer.call_seconds": Key(
        number("(0, inf)"), "speed",
        "Seconds of training in one jitted call; progress and signals are handled between calls.",
    ),
    "trainer.time_limit": Key(
        DURATION, "start",
        "Wall time of this start; the run saves a checkpoint in time and exits with code 75.",
    ),
    "trainer.profile": Key(
        described("A:B, the steps as in a Python slice, or null"), "start",
        "Steps to trace with the JAX profiler, such as 10:20 (docs/speed.md).",
    ),
    "trainer.compilation_cache": Key(
        SWITCH, "speed", "Whether to keep compiled programs in ~/.cache/lra/xla.",
    ),
    "trainer.progress": Key(SWITCH, "speed", "Whether to show a progress bar."),
    "tracker.wandb": Key(
        choice("auto", "online", "offline", "off", also=[False]),  # YAML reads a bare off as false
        "start", "Weights & Biases; auto: online if logged in and reachable, else offline.",
    ),
    "tracker.project": Key(text("a word"), "start", "Project on Weights & Biases."),
    "tracker.entity": Key(
        text("a word", optional=True), "start", "User or team on Weights & Biases.",
    ),
    "tracker.group": Key(
        text("a word", optional=True), "start",
        "Group on Weights & Biases; null: TASK-MODEL-PROTOCOL.",
    ),
    "tracker.tags": Key(WORDS, "start", "Tags on Weights & Biases."),
}
# fmt: on

# Sections whose keys are all declared above and required. A record of an older version may lack
# some of them; a backbone of one's own may have other arguments.
COMPLETE_SECTIONS = ("output", "data", "optim", "trainer", "tracker")


def keys_affecting(*effects: Effect) -> tuple[str, ...]:
    """Keys with one of these effects, and sections of which every key has one of them."""
    keys = {key for key, entry in KEYS.items() if entry.affects in effects}
    sections = {key.partition(".")[0] for key in keys}
    whole = {s for s in sections if all(k in keys for k in KEYS if k.startswith(f"{s}."))}
    return (*sorted(keys), *sorted(whole - keys))


def keys_in_eval() -> tuple[str, ...]:
    """Keys that `lra eval` may override."""
    return tuple(key for key, entry in KEYS.items() if entry.in_eval)


def check_config(config: Mapping[str, Any]) -> None:
    """Checks the values of a resolved config that the harness reads.

    Raises:
        ConfigError: a value is not valid, or a required key is missing.
    """
    for key, entry in KEYS.items():
        *sections, name = key.split(".")
        node: Any = config
        for depth, section in enumerate(sections, 1):
            node = node.get(section, {})
            if not isinstance(node, Mapping):
                path = ".".join(sections[:depth])
                subkeys = [k.removeprefix(f"{path}.") for k in KEYS if k.startswith(f"{path}.")]
                raise ConfigError(f"{path}={format_value(node)} {must_have(subkeys)}")
        if name in node:
            entry.valid.check(key, node[name])
        elif not sections or sections[0] in COMPLETE_SECTIONS:
            raise ConfigError(f"{key} is missing; `lra keys {key}` prints its default")
