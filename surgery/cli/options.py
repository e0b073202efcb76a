"""Options that several commands have, and the values they are collected into."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from surgery import defaults
from surgery.errors import UsageError
from surgery.plan.methods import METHODS
from surgery.registry import Registry
from surgery.repair.methods import REPAIRS

if TYPE_CHECKING:
    from surgery.checkpoint.push import PushTarget, RepoType
    from surgery.engine.open_model import Model
    from surgery.text import TokenBlocks

ALLOCATION_NAMES = ("uniform", "global", "searched", "score")
Command = TypeVar("Command", bound=Callable[..., Any])


class FilePath(click.Path):
    """A path that may begin with ~, also where the shell leaves that (`--out=~/folder`)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 (click's convert takes text)


PATH = FilePath(path_type=Path)


class RegisteredName(click.ParamType[str]):
    """The name of an entry of a registry, those of installed packages included."""

    name = "name"

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.registry:
            self.fail(f"{value!r} is not one of {', '.join(self.registry)}.", param, ctx)
        return value

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        names = [name for name in self.registry if name.startswith(incomplete)]
        return [click.shell_completion.CompletionItem(name) for name in names]


METHOD_NAME, REPAIR_NAME = RegisteredName(METHODS), RegisteredName(REPAIRS)


@dataclass(frozen=True)
class ModelOptions:
    """Which revision of MODEL to open, and how to run it."""

    revision: tuple[str, ...]
    range_reads: bool
    device: str
    dtype: str
    memory: str | None
    trust_remote_code: bool

    def open(self, source: str) -> Model:
        """Open MODEL. Raises UsageError for several revisions."""
        from surgery.engine.open_model import open_model

        if len(self.revision) > 1:
            raise UsageError(
                "one --revision at a time", where=source, next_step="`surgeon index` takes several"
            )
        return open_model(
            source,
            revision=self.revision[0] if self.revision else None,
            device=self.device,
            dtype=self.dtype,
            memory=self.memory,
            range_reads=self.range_reads,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text to calibrate on, and how many of its tokens."""

    calibration: tuple[str, ...]
    calibration_weights: tuple[float, ...] | None
    text_column: str | None
    blocks: int
    block_size: int
    seed: int
    spike_prompt: str | None

    def draw(self, model: Model, blocks: int) -> TokenBlocks:
        """`blocks` calibration blocks, without prompts."""
        from surgery.index.calibration import draw_calibration

        return draw_calibration(model, self.calibration, blocks=blocks, **self.drawing)

    @property
    def drawing(self) -> dict[str, Any]:
        """How blocks are drawn, as the library takes it."""
        return {
            "weights": self.calibration_weights,
            "block_size": self.block_size,
            "seed": self.seed,
            "text_column": self.text_column,
        }

    @property
    def words(self) -> list[str]:
        """The options that name the texts again, free of paths of this machine."""
        return text_words("--calibration", self.calibration, self.calibration_weights, self.text_column)


@dataclass(frozen=True)
class PushOptions:
    """How to publish a folder."""

    private: bool
    push_revision: str | None
    create_pr: bool
    collection: str | None

    def target(self, repo: str, overwrite: bool, repo_type: RepoType = "model") -> PushTarget:
        """Where to publish, checked to be writable by the account the token belongs to. Raises HubError."""
        from surgery.checkpoint.push import PushTarget, check_push

        target = PushTarget(
            repo, self.private, self.push_revision, self.create_pr, overwrite, self.collection, repo_type
        )
        check_push(target)
        return target


def _add(options: list[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """A decorator that adds options to a command."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def collected(
    values: type[Any], name: str, options: list[Callable[[Command], Command]]
) -> Callable[[Command], Command]:
    """A decorator that adds options to a command and passes them on as one `name` of class `values`."""
    fields = [field.name for field in dataclasses.fields(values)]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            mine = {field: given.pop(field) for field in fields}
            return command(**{name: values(**mine)}, **given)

        wrapped: Any = call
        return _add(options)(wrapped)

    return decorate


def text_words(
    option: str, texts: Sequence[str], weights: Sequence[float] | None, column: str | None = None
) -> list[str]:
    """The options that name texts, their weights and their column again, free of paths of this machine."""
    words = []
    for text in texts:
        words += [option, Path(text).name if Path(text).exists() else text]
    words += [f"{option}-weights", ",".join(f"{weight:.12g}" for weight in weights)] if weights else []
    return words + (["--text-column", column] if column else [])


def numbers(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas."""
    if value is None:
        return None
    try:
        return tuple(float(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not numbers separated by commas", param=parameter) from error


model_options = collected(
    ModelOptions,
    "how",
    [
        click.option("--revision", multiple=True, help="Branch, tag or commit of a Hub model."),
        click.option(
            "--range-reads", is_flag=True, help="Read byte ranges from the Hub; store no weight file."
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            help="Compute in float32, bfloat16 or float16; auto: the checkpoint's where it is fast.",
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            help="Memory budget above what the libraries take, as 8GiB: hidden states that do not fit spill "
            "to disk, repair matrices are solved in blocks, and less than the least is refused. "
            "[default: half of the machine's]",
        ),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run the code that comes with MODEL's tokenizer."
        ),
    ],
)

drawing_options = [
    click.option("--blocks", default=defaults.BLOCKS, show_default=True, help="Calibration blocks."),
    click.option("--block-size", default=defaults.BLOCK_SIZE, show_default=True, help="Tokens in a block."),
    click.option("--seed", default=defaults.SEED, show_default=True, help="Which blocks are drawn."),
]

method_option = click.option(
    "--method",
    type=METHOD_NAME,
    default=defaults.METHOD,
    show_default=True,
    metavar="NAME",
    help=f"How channels are ranked: {', '.join(METHOD_NAME.registry)}.",
)

repair_option = click.option(
    "--repair",
    type=REPAIR_NAME,
    default=defaults.REPAIR,
    show_default=True,
    metavar="NAME",
    help="How weights that stay are refitted on the calibration text: "
    f"{', '.join(REPAIR_NAME.registry)}. lstsq refits each layer by itself, lstsq-acc makes up for "
    "the layers before it too and scales the final norm, bias puts back only the mean.",
)

multiple_of_option = click.option(
    "--multiple-of", type=int, help="Round widths to this. [default: 128, 64 below 4096]"
)

text_column_option = click.option(
    "--text-column",
    metavar="NAME",
    help="Column of a dataset that holds the text or the chat. [default: by usual names]",
)

calibration_options = collected(
    CalibrationOptions,
    "text_options",
    [
        click.option(
            "--calibration",
            multiple=True,
            default=defaults.CALIBRATION_TEXTS,
            show_default=True,
            metavar="NAME|FILE|DATASET",
            help="Text to calibrate on: web, wikitext, code or chat, a file, or a dataset as "
            "ID[:CONFIG[:SPLIT]]. Give it several times for a mixture.",
        ),
        click.option(
            "--calibration-weights",
            callback=numbers,
            metavar="W,W,...",
            help="Shares of the texts of a mixture. [default: equal]",
        ),
        text_column_option,
        *drawing_options,
        click.option(
            "--spike-prompt", help="One more prompt to look for super weights in, besides five of surgeon's."
        ),
    ],
)

index_option = click.option(
    "--index",
    "index_folder",
    metavar="INDEX",
    help="Index to use: a folder, or ORG/NAME[@REVISION] of the Hub. [default: made on the fly]",
)

super_weights_index_option = click.option(
    "--index",
    "index_folder",
    metavar="INDEX",
    help="Take super weights from it: a folder, or ORG/NAME[@REVISION] of the Hub.",
)

talk_options = _add(
    [
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--quiet", is_flag=True, help="Suppress progress and messages."),
    ]
)

output_options = _add(
    [
        click.option("--out", type=PATH, help="Folder to write."),
        click.option("--overwrite", is_flag=True, help="Replace the folder if it exists."),
        click.option(
            "--dry-run", is_flag=True, help="Say what would be done and what it takes; write nothing."
        ),
    ]
)

resume_option = click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Resume an interrupted run of the same command, or start over.",
)

push_options = collected(
    PushOptions,
    "push_options",
    [
        click.option("--private", is_flag=True, help="Make the repo private."),
        click.option("--push-revision", metavar="BRANCH", help="Branch to push to. [default: main]"),
        click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing."),
        click.option(
            "--collection",
            metavar="NAME",
            help="Put the repo into this collection of the account: a title, or ACCOUNT/TITLE-ID.",
        ),
    ],
)
