"""Declares every key of the harness: valid values, a line of help, and what the key affects.

Defaults are in conf/. Tasks, models and backbones validate the arguments of their constructors.
"""

from collections.abc import Iterator, Mapping
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

MAX_EXAMPLES = 10**8  # of a split; one of 2,048 ids each has 200 GB

# Keys that have a new name, with the subkeys of each.
RENAMED = {"task.budget": "task.hparams", "model.budget": "model.param_count"}


@dataclass(frozen=True)
class Key:
    """One key of the harness.

    Attributes:
        affects: what another value changes.
        in_eval: whether `lra eval` may override the recorded value.
    """

    help: str
    valid: Rule
    affects: Effect = "result"
    in_eval: bool = False


# fmt: off
KEYS: Mapping[str, Key] = {
    "seed": Key(  # JAX would silently take it modulo 2^32
        "Seed of the parameters, of the batch order and of dropout.",
        number("[0, 4294967295]", whole=True),
    ),
    "resume": Key(
        "never: refuse a folder that holds a run; auto: continue it from its newest checkpoint.",
        choice("never", "auto"), "start",
    ),
    "tuning_runs": Key(
        "Number of runs behind the choice of these settings; tables show it beside the score.",
        count(), "start",
    ),
    "output.root": Key(
        "Folder of the runs: ROOT/TASK/MODEL/PROTOCOL-sSEED-HASH, with the hash of the config.",
        text("the path of a folder"), "process",
    ),
    "data.root": Key(
        "Folder of the publishers' files and of the prepared data; $LRA_DATA sets the default.",
        text("the path of a folder"), "process", in_eval=True,
    ),
    "data.download": Key(
        "Whether to download a publisher's files that are missing.", SWITCH, "start", in_eval=True,
    ),
    "data.allow_partial": Key(
        "Whether to accept fewer examples than the task defines; the record is marked as partial.",
        SWITCH, in_eval=True,
    ),
    "data.verify": Key(
        "When to check the hashes of prepared data (ranges: always); auto: a large store once for "
        "each state of its files.",
        choice("always", "auto", "never"), "start", in_eval=True,
    ),
    "data.placement": Key(
        "device: all data on the accelerator; host: prefetched batches; auto: device if it fits.",
        choice("auto", "device", "host"), "start",
    ),
    "task.hparams": Key(
        "Customary sizes of the task, the defaults of backbone.*, trainer.* and model.*.",
        described("a mapping"),
    ),
    "task.sizes.train": Key("Number of training examples.", count(most=MAX_EXAMPLES)),
    "task.sizes.val": Key("Number of validation examples.", count(most=MAX_EXAMPLES)),
    "task.sizes.test": Key("Number of test examples.", count(most=MAX_EXAMPLES)),
    "model.recipe": Key(
        "The block and the learning rates of the model's paper, the defaults of backbone.* and "
        "optim.*.",
        described("a mapping"),
    ),
    "model.param_count": Key(
        "Number of parameters from which backbone.width is chosen (docs/param_count.md).",
        described("200k, 1.5M, 200000, lru (as many as that model), 200k+-5%, or null"), "start",
    ),
    "protocol.name": Key("Name of the protocol; tables never mix two in one row.", text("a word")),
    "protocol.inputs": Key("Tokenization and lengths of the inputs.", described("lra2020 or s4")),
    "protocol.validation": Key(
        "Source of the validation split if the publisher has none: a part of train, or test.",
        described("train or test"),
    ),
    "protocol.shuffle": Key(
        "Whether to shuffle files (with a fixed seed) before they are divided into splits.", SWITCH,
    ),
    "protocol.pair_head": Key(
        "Input of the head of a pair: interact [u, v, u-v, u*v] or concat [u, v].",
        described("interact or concat"),
    ),
    "protocol.select": Key(
        "Weights scored on test: those with the best validation accuracy, or the last.",
        choice("best", "last"),
    ),
    # limits against typing errors, because a larger model takes hours to trace or all memory
    "backbone.depth": Key("Number of blocks.", number("[1, 1000]", whole=True)),
    "backbone.width": Key("Width D of the residual stream.", number("[1, 65536]", whole=True)),
    "backbone.dropout": Key("Dropout rate inside the blocks.", number("[0, 1)")),
    "backbone.tie_dropout": Key(
        "One dropout mask for all positions of a sequence, inside the blocks.", SWITCH,
    ),
    "backbone.embedding_dropout": Key(
        "Dropout rate after the embeddings and their positions.", number("[0, 1)"),
    ),
    "backbone.norm": Key("Normalization of each block.", described("batch, layer, rms or none")),
    "backbone.norm_position": Key(
        "Normalization before the mixer, or after the residual sum.", described("pre or post"),
    ),
    "backbone.norm_momentum": Key("Momentum of batch norm's running statistics.", number("[0, 1)")),
    "backbone.final_norm": Key("One more normalization before pooling.", SWITCH),
    "backbone.activation": Key(
        "Activation after the mixer.", described("none, gelu, relu or silu"),
    ),
    "backbone.glu": Key(
        "Gated linear unit after the activation.", described("full, half1, half2 or none"),
    ),
    "backbone.mlp": Key(
        "MLP of a second residual branch, as in a Transformer.",
        described("none, gelu, relu, silu or swiglu"),
    ),
    "backbone.mlp_ratio": Key("Hidden width of the MLP divided by D.", number("(0, inf)")),
    "backbone.pool": Key(
        "Pooling over the positions; cls adds a class token.", described("mean, last or cls"),
    ),
    "backbone.head": Key(
        "Classification head; mlp has one hidden layer of width mlp_ratio * D. Pairs use "
        "pair_head.",
        described("linear or mlp"),
    ),
    "backbone.pair_head": Key("Default: protocol.pair_head.", described("interact or concat")),
    "backbone.pair_head_ratio": Key(
        "Hidden width of the head of a pair divided by D.", number("(0, inf)"),
    ),
    "backbone.head_activation": Key(
        "Activation of a head's hidden layer; null: relu for mlp, gelu for pairs.",
        described("gelu, relu, silu or null"),
    ),
    "backbone.init": Key(
        "Initialization of encoder, MLPs and head: Flax's, or that of Mega's code.",
        described("flax or mega"),
    ),
    "backbone.mask_zeros": Key(
        "Hide id 0 from the mixers also inside a sequence, where it is a black pixel.", SWITCH,
    ),
    "backbone.positions": Key(
        "Position embedding; rotary belongs to the mixer, the others are added to the embeddings.",
        described("none, learned, sinusoidal or rotary"),
    ),
    "backbone.precision": Key("Default: trainer.precision.", described("float32, tf32 or bf16")),
    "backbone.remat": Key(
        "Default: trainer.remat.",
        described("none, block, dots or a policy of JAX"), "speed",
    ),
    "optim.lr": Key("Peak learning rate.", number("(0, inf)")),
    "optim.weight_decay": Key("Decoupled weight decay outside the groups.", number("[0, inf)")),
    "optim.b1": Key("Decay rate of Adam's first moment.", number("[0, 1)")),
    "optim.b2": Key("Decay rate of Adam's second moment.", number("[0, 1)")),
    "optim.eps": Key("Epsilon in Adam's denominator.", number("(0, inf)")),
    "optim.warmup": Key("Linear warm-up, as a fraction of all steps.", number("[0, 1]")),
    "optim.lr_start": Key("Learning rate at the start of the warm-up.", number("[0, inf)")),
    "optim.lr_end": Key(
        "Final learning rate of cosine and linear; lower bound of plateau.", number("[0, inf)"),
    ),
    "optim.schedule": Key(
        "Schedule after the warm-up; rsqrt is lr * sqrt(warm-up steps / step).",
        choice("cosine", "linear", "rsqrt", "constant", "plateau"),
    ),
    "optim.plateau.metric": Key(
        "Validation metric of schedule=plateau, which follows PyTorch's ReduceLROnPlateau.",
        choice("accuracy", "loss"),
    ),
    "optim.plateau.factor": Key(
        "Factor by which plateau lowers the learning rate.", number("(0, 1)"),
    ),
    "optim.plateau.patience": Key(
        "Number of evaluations without an improvement before plateau lowers the rate.",
        number("[0, inf)", whole=True),
    ),
    "optim.plateau.threshold": Key(
        "Smallest relative change that counts as an improvement.", number("[0, 1)"),
    ),
    "optim.ema": Key(
        "Decay of the moving average of the weights, which is evaluated, selected and saved.",
        number("(0, 1)", None),
    ),
    "optim.label_smoothing": Key("Label smoothing of the training loss.", number("[0, 1)")),
    "optim.clip": Key("Largest global norm of the gradient.", number("(0, inf)", None)),
    "optim.groups": Key(
        "Parameter groups by path, such as blocks/0/mixer/m_y; the first match wins.",
        ParameterGroups(),
    ),
    "optim.no_decay": Key("Paths of ungrouped parameters without weight decay.", OPTIONAL_PATTERN),
    "trainer.steps": Key("Number of optimizer steps.", count()),
    "trainer.batch_size": Key("Examples of one step, over all devices and micro-batches.", count()),
    "trainer.micro_batch": Key(
        "Examples of one forward and backward pass, a divisor of batch_size; null: batch_size; "
        "auto: the largest that fits.",
        count("auto", None),
    ),
    "trainer.remat": Key(
        "Rematerialization of each block in the backward pass: block: all; dots: all but products "
        "with weights; or a policy of jax.checkpoint_policies.",
        choice(
            *("none", "block", "dots", "everything_saveable", "nothing_saveable"),
            *("dots_saveable", "dots_with_no_batch_dims_saveable"),
        ), "speed",
    ),
    "trainer.precision": Key(
        "Precision of the blocks; with bf16, parameters, statistics, states, spectra and losses "
        "stay float32.",
        choice("float32", "tf32", "bf16"),
    ),
    "trainer.devices": Key("Number of devices of each process; null: all.", count(None), "start"),
    "trainer.distributed": Key(
        "Several processes of one run; auto reads SLURM, Open MPI or a TPU pod.",
        described("null, auto or {coordinator: HOST:PORT, num_processes: N, process_id: I}"),
        "process",
    ),
    "trainer.distributed_timeout": Key("Seconds for all processes to connect.", count(), "start"),
    "trainer.deterministic": Key(
        "Whether to use only GPU operations that repeat bit for bit; slower.", SWITCH, "speed",
    ),
    "trainer.eval_every": Key(
        "Steps between evaluations; null: steps / 20, but at least 100.", count(None),
    ),
    "trainer.early_stopping": Key(
        "Number of evaluations without a better validation accuracy that ends a run; null: never.",
        count(None),
    ),
    "trainer.checkpoint_every": Key(
        "Steps between checkpoints; null: eval_every.", count(None), "speed",
    ),
    "trainer.log_every": Key(
        "Steps averaged in one line of metrics.jsonl; null: a hundredth of all steps.",
        count(None), "speed",
    ),
    "trainer.eval_batch_size": Key(
        "Examples of one evaluation batch.", count(), "speed", in_eval=True,
    ),
    "trainer.eval_examples": Key(
        "Examples of validation and of test that are scored, a random sample stratified by label; "
        "null: all; a number marks the record as partial.",
        count(None),
    ),
    "trainer.train_eval_examples": Key(
        "Training examples on which the selected weights are scored, sampled as eval_examples.",
        count(),
    ),
    "trainer.first_loss_tolerance": Key(
        "Factor between the first loss and log(classes) above which a run warns; null: never.",
        number("(1, inf)", None), "speed",
    ),
    "trainer.chance_after": Key(
        "Fraction of the steps after which validation accuracy at chance is a warning; null: "
        "never.",
        number("[0, 1]", None), "speed",
    ),
    "trainer.call_seconds": Key(
        "Seconds of training in one jitted call; progress and signals are handled between calls.",
        number("(0, inf)"), "speed",
    ),
    "trainer.time_limit": Key(
        "Wall time of this start; the run saves a checkpoint in time and exits with code 75.",
        DURATION, "start",
    ),
    "trainer.profile": Key(
        "Steps to trace with the JAX profiler, such as 10:20 (docs/speed.md).",
        described("A:B, the steps as in a Python slice, or null"), "start",
    ),
    "trainer.compilation_cache": Key(
        "Whether to keep compiled programs in ~/.cache/lra/xla.", SWITCH, "speed",
    ),
    "trainer.progress": Key("Whether to show a progress bar.", SWITCH, "speed"),
    "tracker.wandb": Key(  # YAML reads a bare off as false
        "Weights & Biases; auto: online if logged in and reachable, else offline.",
        choice("auto", "online", "offline", "off", also=[False]), "start",
    ),
    "tracker.project": Key("Project on Weights & Biases.", text("a word"), "start"),
    "tracker.entity": Key(
        "User or team on Weights & Biases.", text("a word", optional=True), "start",
    ),
    "tracker.group": Key(
        "Group on Weights & Biases; null: TASK-MODEL-PROTOCOL.",
        text("a word", optional=True), "start",
    ),
    "tracker.tags": Key("Tags on Weights & Biases.", WORDS, "start"),
}
# fmt: on

# Sections whose keys are all declared above and required. A record of an older version may lack
# some of them; a backbone of one's own may have other arguments.
COMPLETE_SECTIONS = ("output", "data", "optim", "trainer", "tracker")


# Sections with keys of their own for each option; constructors refuse unknown ones.
FREE_SECTIONS = ("task", "model", "backbone", "protocol")


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
    """Raises ConfigError if the harness finds a value invalid or a required key missing."""
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


def unknown_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys that no schema entry and no constructor reads."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in KEYS or key in FREE_SECTIONS:
            continue
        if not any(known.startswith(f"{key}.") for known in KEYS):
            yield key
        elif isinstance(value, Mapping):
            yield from unknown_keys(value, f"{key}.")
