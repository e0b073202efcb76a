"""From Hub to Hub with the real clients, against a Hub on this machine, and what its faults lead to."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers.hub_world import World
from helpers.loopback_hub import Fault, LoopbackHub
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import CALIBRATION

from surgery import __version__
from surgery.card.render import render_card

PRUNE = [
    "prune",
    "org/tiny",
    "--multiple-of",
    "8",
    "--range-reads",
    "--quiet",
    "--eval",
    "none",
    *CALIBRATION,
]
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("hello", return_tensors="pt")
print(model.config.intermediate_size, model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1])
"""


def weight_bytes(hub: LoopbackHub) -> int:
    return sum(count for path, count in hub.bytes_out.items() if path.endswith(".safetensors"))


def test_hub_to_hub(world: World) -> None:
    hub = world.hub
    size = sum(len(d) for f, d in hub.files("org/tiny").items() if f.endswith(".safetensors"))
    world.surgeon("index", "org/tiny", "--range-reads", "--out", "index", "--quiet", *CALIBRATION)
    assert weight_bytes(hub) <= 3.1 * size  # spikes, forward, backward
    hub.bytes_out.clear()
    world.surgeon(*PRUNE, "--index", "index", "--out", "cut", "--push", "me/cut")
    assert weight_bytes(hub) <= 1.1 * size
    assert not list((world.folder / "home").rglob("*.safetensors"))

    published = hub.files("me/cut")
    commits = hub.repos["me/cut"].commits
    assert [bool(files) for files in commits.values()] == [False, True], "one commit made everything visible"
    local = {p.name: p.read_bytes() for p in (world.folder / "cut").iterdir()}
    assert published == local
    card = published["README.md"].decode()
    assert "base_model: org/tiny" in card and "license: apache-2.0" in card and "- pruned" in card
    manifest = json.loads(published["surgeon.json"])
    assert manifest["source"]["revision"] == hub.repos["org/tiny"].branches["main"]

    loaded = world.run("-c", LOAD, "me/cut", home="empty-home")
    assert loaded.stdout.split()[0] == "24"
    before = len(hub.uploaded)
    world.surgeon("push", "cut", "me/cut")
    assert len(hub.uploaded) == before, "nothing large went up twice"


def test_cached_read_uses_the_ordinary_cache(world: World) -> None:
    world.surgeon("index", "org/tiny", "--out", "index", "--quiet", *CALIBRATION)
    assert list((world.folder / "home").rglob("*.safetensors"))
    offline = {"HF_HUB_OFFLINE": "1"}
    world.surgeon("index", "org/tiny", "--out", "again", "--quiet", *CALIBRATION, **offline)
    assert (world.folder / "index/index.safetensors").read_bytes() == (
        world.folder / "again/index.safetensors"
    ).read_bytes()
    missing = world.surgeon("index", "org/other", "--out", "other", *CALIBRATION, code=1, **offline)
    assert "not in the cache" in missing.stderr


@pytest.mark.parametrize(
    "faults",
    [
        [
            Fault("GET", r"resolve/.*00001-of.*safetensors", times=2, drop=True),
            Fault("GET", r"resolve/.*00002-of.*safetensors", times=2, cut_body=True),
            Fault("PUT", r"/lfs/", times=1, drop=True),
        ],
        [
            Fault("GET", r"resolve/.*00001-of.*", times=2, status=429, headers={"Retry-After": "0"}),
            Fault("GET", r"resolve/.*00002-of.*", times=2, status=500),
            Fault("PUT", r"/lfs/", times=1, status=503),
        ],
    ],
    ids=["broken lines", "refusals"],
)
def test_passing_faults_end_in_success(faults: list[Fault], world: World) -> None:
    world.hub.faults += faults
    world.surgeon(*PRUNE, "--out", "cut", "--push", "me/cut")
    assert [fault.times for fault in faults] == [0, 0, 0]
    assert world.hub.files("me/cut") == {p.name: p.read_bytes() for p in (world.folder / "cut").iterdir()}


def test_failures_end_in_one_clear_line(world: World) -> None:
    hub = world.hub
    hub.put("org/gated", {"config.json": b"{}"}, gated=True)
    cases = [
        (["index", "org/missing"], {}, "no such repo"),
        (["index", "org/gated"], {}, "ask for access at"),
        (["index", "org/tiny", "--revision", "nope"], {}, "no such revision"),
        ([*PRUNE, "--push", "me/cut", "--out", "a"], {"HF_TOKEN": "hf_wrong"}, "log in"),
        ([*PRUNE, "--push", "me/cut", "--out", "a"], {"HF_TOKEN": ""}, "no token"),
        ([*PRUNE, "--push", "them/cut", "--out", "b"], {}, "can't write there"),
        ([*PRUNE, "--push", "me/theirs", "--out", "c"], {}, "not written by surgeon"),
    ]
    hub.put("me/theirs", {"model.safetensors": b"precious"})
    for kind in dict.fromkeys((arguments[0], *environment.values()) for arguments, environment, _ in cases):
        alike = [case for case in cases if (case[0][0], *case[1].values()) == kind]
        started = len(hub.requests)
        results = world.several(*(arguments for arguments, _, _ in alike), **alike[0][1])
        for (_, _, message), result in zip(alike, results, strict=True):
            lines = result["stderr"].strip().splitlines()
            assert result["code"] == 1 and message in result["stderr"]
            assert lines[-2].startswith("Error: ") and lines[-1].startswith("Next: ")
        assert kind[0] == "prune" or not any("safetensors" in path for _, path in hub.requests[started:])
    assert hub.files("me/theirs") == {"model.safetensors": b"precious"}
    assert "me/cut" not in hub.repos
    hub.role = "read"
    result = world.surgeon(*PRUNE, "--push", "me/cut", "--out", "d", code=1)
    assert "may only read" in result.stderr and not (world.folder / "d").exists()


def test_upload_that_keeps_failing_shows_nothing(world: World) -> None:
    world.hub.faults.append(Fault("PUT", r"/lfs/", times=100, corrupt=True))
    result = world.surgeon(*PRUNE, "--out", "cut", "--push", "me/cut", code=1)
    assert "pushing" in result.stderr
    assert world.hub.files("me/cut") == {}
    world.hub.faults.clear()
    world.surgeon("push", "cut", "me/cut")
    assert "model.safetensors" in world.hub.files("me/cut")


def test_changed_file_is_refused(world: World) -> None:
    hub = world.hub
    name = next(
        f
        for f in hub.files("org/tiny")
        if f.endswith("00002-of-00004.safetensors")
        or f.endswith("00002-of-00005.safetensors")
        or "00002" in f
    )
    oid = hub.repos["org/tiny"].commits[hub.repos["org/tiny"].branches["main"]][name]
    (world.folder / "watch.py").write_text(
        "import sys, surgery.checkpoint.hub as hub\n"
        "real = hub.HubRepo._range\n"
        "def stale(self, file, start, stop):\n"
        "    if not self.headers_only: self.sizes = {f: s + 8 for f, s in self.sizes.items()}\n"
        "    return real(self, file, start, stop)\n"
        "hub.HubRepo._range = stale\n"
        "from surgery.cli.main import main\nmain()\n"
    )
    assert oid in hub.blobs
    result = world.run(
        "watch.py", "index", "org/tiny", "--range-reads", "--out", "index", *CALIBRATION, code=1
    )
    assert "changed on the Hub" in result.stderr and not (world.folder / "index").exists()


def test_branches_and_pull_requests(world: World) -> None:
    (world.folder / "card.txt").write_text("# {{ method }} of {{ manifest.source.name }}")
    unmeasured = [word for word in PRUNE if word not in ("--eval", "none")]
    _, refused, _, dry = world.several(
        [*PRUNE, "--out", "own-card", "--card-template", "card.txt"],
        [*unmeasured, "--push", "me/cut", "--out", "x"],
        [*PRUNE, "--out", "cut", "--eval", "text.txt", "--eval-blocks", "2"],
        ["push", "cut", "me/cut", "--dry-run"],
    )
    assert (world.folder / "own-card" / "README.md").read_text() == "# LP-hybrid of org/tiny"
    assert refused["code"] == 1 and "the text can't be loaded" in refused["stderr"]
    assert "| perplexity |" in (world.folder / "cut" / "README.md").read_text()
    assert "model.safetensors" in dry["stdout"] and "# tiny" in dry["stdout"]
    assert "me/cut" not in world.hub.repos
    _, asked = world.several(
        ["push", "cut", "me/cut", "--private", "--push-revision", "half"],
        ["push", "cut", "me/cut", "--create-pr"],
    )
    assert world.hub.repos["me/cut"].private and world.hub.files("me/cut") == {}
    assert "model.safetensors" in world.hub.files("me/cut", "half")
    assert "discussions/1" in asked["stdout"]
    assert "model.safetensors" in world.hub.files("me/cut", "refs/pr/1")


def test_several_revisions_are_compared(world: World) -> None:
    files = world.hub.files("org/tiny")
    world.hub.put("org/tiny", files, branch="step-1")
    arguments = ["--revision", "step-1", "--revision", "main", "--out", "runs", "--json", *CALIBRATION]
    printed = json.loads(world.surgeon("index", "org/tiny", *arguments).stdout)
    assert [row["name"] for row in printed["indexes"]] == ["step-1", "main"]
    assert [row["supernodes_shared"] for row in printed["indexes"]] == [1.0, 1.0]
    shown = world.surgeon("show", "runs")
    assert "step-1" in shown.stdout and "100%" in shown.stdout
    assert json.loads(world.surgeon("show", "runs", "--json").stdout) == printed
    assert "one --revision at a time" in world.surgeon("prune", "org/tiny", *arguments[:4], code=2).stderr


def parquet_rows(count: int, group: int) -> bytes:
    """A Parquet file with a column `text`, in row groups of `group` rows."""
    import io

    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    words = [
        f"Row {number} of many, {number * 2654435761 % 2**32:x} unlike the others." for number in range(count)
    ]
    file = io.BytesIO()
    parquet.write_table(arrow.table({"text": words}), file, row_group_size=group, compression="none")
    return file.getvalue()


def test_a_large_data_set_is_read_no_further_than_needed(world: World) -> None:
    data = parquet_rows(1_000_000, 2_000)
    sha = world.hub.put("org/rows", {"data/train-00000-of-00001.parquet": data, "README.md": b"# rows\n"})
    world.hub.bytes_out.clear()
    options = ["--calibration", "org/rows", "--blocks", "4", "--block-size", "32", "--range-reads"]
    world.surgeon("index", "org/tiny", "--out", "index", *options)
    read = world.hub.bytes_out["data/train-00000-of-00001.parquet"]
    assert 0 < read < 7 << 20 < len(data) / 7  # the Hub client fetches 5 MiB at a time
    calibration = json.loads((world.folder / "index" / "index.json").read_text())["calibration"]
    assert calibration["name"] == "org/rows"
    assert [part["revision"] for part in calibration["parts"]] == [sha]


READ_BACK = """
import json, sys
from huggingface_hub import HfApi, ModelCard
api = HfApi()
cards = {repo: ModelCard.load(repo).data for repo in sys.argv[2:]}
collection = api.get_collection(sys.argv[1])
print(json.dumps({
    "items": [item.item_id for item in collection.items],
    "cards": {
        repo: [card.base_model, card.get("base_model_relation"), card.tags] for repo, card in cards.items()
    },
    "files": {repo: api.list_repo_files(repo) for repo in sys.argv[2:]},
}))
"""


def save_gguf(folder: Path) -> None:
    """A folder as `surgeon export cut --gguf` writes it."""
    folder.mkdir()
    file = write_gguf(folder / "model.gguf", "llama")
    entry = {"file": file.name, "type": "f32", "architecture": "llama", "types": {"F32": 1}, "notes": []}
    manifest = {
        "schema_version": 1,
        "source": {"name": "cut", "revision": None, "bytes": 1},
        "result": {"parameters": 1, "bytes": file.stat().st_size},
        "gguf": {**entry, "quantiser": "surgeon"},
        "super_weights": [],
        "measurements": {},
        "repo": None,
        "versions": {"surgeon": "0"},
        "command": None,
    }
    (folder / "surgeon.json").write_text(json.dumps(manifest))
    (folder / "README.md").write_text(render_card(manifest))


def test_forms_of_one_model_are_tied_by_relations_tags_and_a_collection(world: World) -> None:
    hub, folder = world.hub, world.folder
    tied = ("--collection", "Tiny cuts")
    world.surgeon(*PRUNE, "--repair", "none", "--out", "cut", "--push", "me/cut", *tied)
    world.surgeon("quantize", "cut", "--group-size", "8", "--no-clip", "--out", "packed", "--quiet")
    save_gguf(folder / "cut-gguf")
    world.surgeon("push", "packed", "me/packed", *tied)
    assert "In the collection" in world.surgeon("push", "cut-gguf", "me/cut-gguf", *tied).stderr
    (slug,) = hub.collections
    back = json.loads(world.run("-c", READ_BACK, slug, "me/cut", "me/packed", "me/cut-gguf").stdout)
    assert back["items"] == ["me/cut", "me/packed", "me/cut-gguf"]
    assert back["cards"]["me/cut"][:2] == ["org/tiny", "finetune"]
    assert back["cards"]["me/packed"][:2] == ["me/cut", "quantized"]
    assert back["cards"]["me/cut-gguf"][:2] == ["me/cut", "quantized"]
    assert all("surgeon" in tags for _, _, tags in back["cards"].values())
    assert "lp-hybrid" in back["cards"]["me/cut"][2] and "gguf" in back["cards"]["me/cut-gguf"][2]
    assert "model.gguf" in back["files"]["me/cut-gguf"]
    assert "llama-cli -hf me/cut-gguf" in hub.files("me/cut-gguf")["README.md"].decode()
    assert "vllm serve me/cut" in hub.files("me/cut")["README.md"].decode()
    made = json.loads(hub.files("me/cut")["surgeon.json"])["reproduce"]
    assert made["source"]["revision"] == hub.repos["org/tiny"].branches["main"]
    assert made["command"].startswith("surgeon prune org/tiny --revision ")
    assert made["seeds"] == {"calibration": 42, "plan": 42} and len(made["calibration"]["sha256"]) == 64


def hf_jobs(world: World, printed: str) -> tuple[dict[str, str], list[str]]:
    """What the `hf` command line makes of a printed command (key -> value), and the words of its job."""
    words = shlex.split(printed)
    assert words[:4] == ["hf", "jobs", "uv", "run"]
    shown = world.run("-m", "huggingface_hub.cli.hf", *words[1:4], "--dry-run", *words[4:]).stdout
    rows = [line.split(None, 1) for line in shown.splitlines()[1:] if line.startswith("  ")]
    return {row[0]: row[1].strip() for row in rows}, words[words.index("--") + 1 :]


def test_the_printed_job_is_one_that_hf_takes_and_that_runs(world: World) -> None:
    cut = (
        "org/tiny",
        "--multiple-of",
        "8",
        "--calibration",
        "org/prose",
        "--blocks",
        "4",
        "--block-size",
        "32",
    )
    world.hub.put("org/prose", {"train.txt": (world.folder / "text.txt").read_bytes()})
    shown = world.surgeon("prune", *cut, "--eval", "none", "--dry-run", "--jobs", "--push", "me/from-a-job")
    assert "cpu-basic" in shown.stderr and "$" in shown.stderr and "2026-11-26" in shown.stderr
    job, words = hf_jobs(world, shown.stdout)
    assert job["flavor"] == "cpu-basic" and job["timeout"] == "30m" and job["script"] == "surgeon"
    assert job["secrets"] == "HF_TOKEN=***" and job["with"] == f"ffn-surgeon=={__version__}"
    assert words[words.index("--revision") + 1] == world.hub.repos["org/tiny"].branches["main"]
    assert not list(world.folder.glob("tiny-*")) and "me/from-a-job" not in world.hub.repos
    world.surgeon(*words[1:], "--quiet")
    assert "model.safetensors" in world.hub.files("me/from-a-job")


def test_a_job_keeps_its_journal_in_a_bucket(world: World) -> None:
    ask = ("--multiple-of", "8", "--eval", "none", "--dry-run", "--jobs", "--json")
    shown = world.surgeon("prune", "org/tiny", "--bucket", "me/runs", "--out", "cut", *ask)
    answer = json.loads(shown.stdout)
    job, words = hf_jobs(world, shlex.join(answer["command"]))
    assert "hf://buckets/me/runs:/surgeon/run" in job["volumes"]
    assert words[-3:] == ["--out", "/surgeon/run/cut", "--push"]
    assert answer["best"]["dollars"] <= min(one["dollars"] for one in answer["offers"] if not one["lacks"])
