"""Tests of pretrained weights: from torchvision's cache, from its server and from files, all except the head."""

import hashlib
import http.server
import os
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import ShuffleNet_V2_X0_5_Weights

from dreplica.config.schema import ModelConfig, RunConfig
from dreplica.diagnosis.replay.rebuild import rebuild
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from dreplica.replica import published as published_module
from dreplica.replica.build import build_model, build_replica, weights_digest
from dreplica.replica.pretrained import find_head, load_pretrained
from dreplica.replica.published import builder_arguments, find_published
from dreplica.state.rng import seed_generators
from tests.fixtures import tiny_model
from tests.harness import run_job, run_replicas

SHUFFLE = "shufflenet_v2_x0_5"
"""The smallest model for which torchvision has weights."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set torch.hub's cache to an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def random_state(name: str, **arguments: Any) -> "OrderedDict[str, Tensor]":
    """Return a state_dict as torchvision publishes it, with random values."""
    seed_generators(99)
    state = torchvision.models.get_model(name, weights=None, **arguments).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.01, 0.1)
    return state


def put(cache: Path, name: str, state: dict[str, Tensor]) -> Path:
    """Save it to torch.hub's cache."""
    (url,) = {member.url for member in torchvision.models.get_model_weights(name)}
    path = cache / Path(url).name
    torch.save(state, path)
    return path


def build(weights: str | None, name: str = SHUFFLE, seed: int = 1, num_classes: int = 5, **model: Any) -> nn.Module:
    seed_generators(seed)
    return build_model(ModelConfig(name=name, weights=weights, **model), num_classes)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {
        name
        for name in {*one, *other}
        if name not in one or name not in other or not same_bytes(one[name], other[name])
    }


# ---- the head


class NoMemory(TorchFunctionMode):
    """A mode for models without memory or draws. (On torch.device("meta") RegNet and Swin fail: they read values.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs | ({"device": "meta"} if func is torch.empty else {}))


def test_find_head_finds_the_head_of_every_classifier() -> None:
    found = set()
    for name in torchvision.models.list_models(module=torchvision.models):
        with NoMemory():
            model = build_model(ModelConfig(name=name), 9973)  # a prime: only the head has that many outputs
        of_head = {key for key, parameter in model.named_parameters() if parameter.shape[0] == 9973}
        head = find_head(model, 9973)
        assert of_head == {f"{head}.{key}" for key, _ in model.get_submodule(str(head)).named_parameters()}, name
        found.add(head)
    assert len(found) > 5


@pytest.mark.parametrize("name", ["squeezenet1_1", SHUFFLE, "mobilenet_v3_small"])
def test_trunk_is_loaded_and_head_is_drawn_from_seed(cache: Path, name: str) -> None:
    state = random_state(name)
    put(cache, name, state)
    first, again, other = (build("DEFAULT", name, seed) for seed in (1, 1, 2))
    (head,) = {key.rpartition(".")[0] for key in differing(first.state_dict(), state)}
    assert first.get_submodule(head).weight.shape[0] == 5
    assert not differing(first.state_dict(), again.state_dict())
    assert differing(first.state_dict(), other.state_dict()) == {f"{head}.weight", f"{head}.bias"}
    default = nn.Conv2d(512, 5, 1) if name == "squeezenet1_1" else nn.Linear(first.get_submodule(head).in_features, 5)
    assert type(first.get_submodule(head)) is type(default)
    # Initialized with the layer's default, not with that of the model family.
    assert 0.8 < first.get_submodule(head).weight.std() / default.weight.std() < 1.2


def test_find_head_takes_the_last_of_several_matches() -> None:
    model = torchvision.models.squeezenet1_1(num_classes=256)
    assert model.features[-1].expand1x1.out_channels == 256
    assert find_head(model, 256) == "classifier.1"
    assert find_head(model, 7) is None


def test_head_of_the_file_is_not_loaded(cache: Path) -> None:
    state = random_state(SHUFFLE, num_classes=5)
    torch.save(state, cache / "own.pth")
    assert differing(build(str(cache / "own.pth")).state_dict(), state) == {"fc.weight", "fc.bias"}


def test_head_and_rng_do_not_depend_on_the_source(cache: Path) -> None:
    state = random_state(SHUFFLE)
    path = put(cache, SHUFFLE, state)
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, cache / "own.safetensors")
    built, generators = [], []
    for weights in ("DEFAULT", "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", str(path), str(cache / "own.safetensors")):
        built.append(build(weights).state_dict())
        generators.append(torch.get_rng_state())
    assert not any(differing(built[0], other) for other in built[1:])
    assert all(same_bytes(generators[0], other) for other in generators[1:])


def test_traced_rebuild_reproduces_the_build(cache: Path) -> None:
    put(cache, SHUFFLE, random_state(SHUFFLE))
    config = RunConfig(model=ModelConfig(name=SHUFFLE, weights="DEFAULT"))
    rebuilt = rebuild(partial(build_replica, config, 5, torch.device("cpu")), 3)
    assert rebuilt.reproducible
    assert any(record.name.startswith("aten.uniform_") for record in rebuilt.records)


# ---- torchvision's own


def old_densenet_names(state: dict[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Rename as in torchvision's files, which also lack num_batches_tracked."""
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)")
    return OrderedDict(
        (pattern.sub(r"\1.\2", key), tensor) for key, tensor in state.items() if not key.endswith("num_batches_tracked")
    )


@pytest.mark.parametrize(
    ("name", "published_as", "arguments"),
    [
        ("mnasnet0_5", None, {}),
        ("densenet121", old_densenet_names, {}),
        ("googlenet", None, {"aux_logits": True, "init_weights": False}),
    ],
)
def test_model_equals_the_one_torchvision_builds(
    cache: Path, name: str, published_as: Callable[[Any], Any] | None, arguments: dict[str, Any]
) -> None:
    state = random_state(name, **arguments)
    path = put(cache, name, published_as(state) if published_as else state)
    expected = torchvision.models.get_model(name, weights="DEFAULT").eval()
    for weights in ("DEFAULT", str(path)):
        model = build(weights, name).eval()
        head = str(find_head(model, 5))
        assert {key.rpartition(".")[0] for key in differing(model.state_dict(), expected.state_dict())} == {head}
        # The rest of the computation, such as an input transform in the model: compare logits through one head.
        parent, _, last = head.rpartition(".")
        setattr(expected.get_submodule(parent), last, model.get_submodule(head))
        inputs = torch.rand(1, 3, 64, 64)
        assert same_bytes(model(inputs).detach(), expected(inputs).detach())
        expected = torchvision.models.get_model(name, weights="DEFAULT").eval()


def test_vit_uses_the_image_size_of_its_weights() -> None:
    found = find_published("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")
    with NoMemory():
        expected = torchvision.models.vit_b_16(image_size=384)
        model = torchvision.models.vit_b_16(**builder_arguments("vit_b_16", found))
    assert model.encoder.pos_embedding.shape == expected.encoder.pos_embedding.shape
    assert builder_arguments("vit_b_16", find_published("vit_b_16", "DEFAULT")) == {"image_size": 224}
    assert find_published("vit_b_16", f"anywhere/{Path(found.url).name}") is found
    assert find_published("vit_b_16", "anywhere/mine.pth") is None


def test_unknown_weights_error_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"^model\.weights: .*'IMAGENET1K_V9' for resnet18\. Did you mean .*_V1'\?"):
        build("IMAGENET1K_V9", "resnet18")
    with pytest.raises(UsageError, match=r"no weights 'ResNet50_Weights.DEFAULT' for resnet18"):
        build("ResNet50_Weights.DEFAULT", "resnet18")


def test_wrong_hash_in_the_cache_is_warned_about(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = put(cache, SHUFFLE, random_state(SHUFFLE))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    build("DEFAULT")
    assert f"{path} is not the file that torchvision publishes under that name" in caplog.text
    assert f"begins with {sha[:10]}, not f707e7126e" in caplog.text


def test_named_weights_must_fit_completely_files_need_not(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = random_state(SHUFFLE)
    del state["conv1.0.weight"]
    state["conv5.0.weight"] = torch.zeros(3)
    path = put(cache, SHUFFLE, state)
    with pytest.raises(
        UsageError, match=r"(?s)does not hold DEFAULT:.*conv5\.0\.weight: \(3,\).*conv1\.0\.weight.*Delete"
    ):
        build("DEFAULT")
    differ = differing(build(str(path)).state_dict(), state)
    assert differ == {"conv1.0.weight", "conv5.0.weight", "fc.weight", "fc.bias"}
    assert "conv1.0.weight" in caplog.text


@pytest.mark.parametrize("categories", [None, ["cat", "dog"]])
def test_weights_without_categories_may_be_incomplete(categories: list[str] | None, cache: Path) -> None:
    state = tiny_state()
    state["0.weight"].fill_(torch.nan)
    torch.save(state, cache / "features-00000000.pth")
    published = SimpleNamespace(url="http://nowhere/features-00000000.pth", meta={"categories": categories})
    model = tiny_model(5)
    with pytest.raises(UsageError, match=r"0\.weight: nothing but NaN") if categories else nullcontext():
        assert load_pretrained(model, "FEATURES", published, 5) == "5"
    assert not model[0].weight.isnan().any()
    assert find_published("vgg16", "IMAGENET1K_FEATURES").meta["categories"] is None


def test_mnasnet_tensors_without_version_are_current(cache: Path) -> None:
    state = random_state("mnasnet0_5")
    save_file(state, cache / "own.safetensors")
    found = differing(build(str(cache / "own.safetensors"), "mnasnet0_5").state_dict(), state)
    assert found == {"classifier.1.weight", "classifier.1.bias"}


# ---- fetching


class Server(http.server.BaseHTTPRequestHandler):
    """An HTTP handler that serves `content`, failing as `manner` says."""

    content = b""
    manner = ""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        if self.manner == "missing":
            self.send_error(404)
            return
        if self.manner == "silent":
            self.server.over.wait(20)  # type: ignore[attr-defined]
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[:-100] if self.manner == "cut" else self.content)

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Server,), {}))
    running.paths, running.over = [], threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.over.set()  # type: ignore[attr-defined]
    running.shutdown()
    thread.join()
    running.server_close()


def serve(server: Any, folder: Path, manner: str = "") -> str:
    """Return a url for weights of SHUFFLE whose file name has the hash of the served content."""
    torch.save(random_state(SHUFFLE), folder / "served")
    content = (folder / "served").read_bytes()
    server.RequestHandlerClass.content, server.RequestHandlerClass.manner = content, manner
    digits = "0" * 10 if manner == "other" else hashlib.sha256(content).hexdigest()[:10]
    return f"http://127.0.0.1:{server.server_port}/models/shuffle-{digits}.pth"


def fetch_and_build(world: World, url: str, home: str) -> dict[str, Tensor] | str:
    os.environ["TORCH_HOME"] = home
    ShuffleNet_V2_X0_5_Weights.DEFAULT.value.url = url  # type: ignore[misc]  # in this process only
    world.channel.gather(None)
    try:
        return {key: tensor.clone() for key, tensor in build("DEFAULT").state_dict().items()}
    except UsageError as error:
        return str(error)


def test_weights_are_downloaded_once_for_all_replicas(server: Any, cache: Path, tmp_path: Path) -> None:
    url = serve(server, tmp_path)
    home = str(tmp_path / "new" / "home")
    states = run_replicas(fetch_and_build, 3, url, home)
    assert server.paths == ["/models/" + Path(url).name]
    assert not differing(states[0], states[1]) | differing(states[0], states[2])
    assert differing(states[0], random_state(SHUFFLE)) == {"fc.weight", "fc.bias"}
    cached = Path(home, "hub", "checkpoints", Path(url).name)
    assert cached.read_bytes() == server.RequestHandlerClass.content
    # Equal to weights from a file that was already in the cache.
    put(cache, SHUFFLE, random_state(SHUFFLE))
    assert not differing(build("DEFAULT").state_dict(), states[0])


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("other", "invalid hash value"),
        ("missing", "HTTP Error 404"),
        ("cut", "invalid hash value|IncompleteRead"),
        ("silent", "timed out"),
        ("refused", "Connection refused"),
    ],
)
def test_failed_download_error_names_url_and_path(
    manner: str, words: str, server: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(server, tmp_path, manner)
    if manner == "refused":
        url = url.replace(str(server.server_port), "1")  # tcpmux: no server listens there
    monkeypatch.setattr(published_module, "_STALL_TIMEOUT", 0.3)
    monkeypatch.setattr(ShuffleNet_V2_X0_5_Weights.DEFAULT.value, "url", url)
    with pytest.raises(UsageError) as caught:
        build("DEFAULT")
    message = str(caught.value)
    assert (caught.value.code, caught.value.fields["url"]) == ("weights-not-available", url)
    assert re.search(words, message)
    for part in (
        "model.weights: ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1 is not on this machine",
        f"Download {url} ",
        f"to {cache / Path(url).name} ",
        "set model.weights to its path",
    ):
        assert part in message
    left = {path.suffix for path in cache.iterdir()}
    assert left <= {".lock", ".failed"}
    # The remedy works.
    (cache / Path(url).name).write_bytes(server.RequestHandlerClass.content)
    assert differing(build("DEFAULT").state_dict(), random_state(SHUFFLE)) == {"fc.weight", "fc.bias"}


def test_unwritable_cache_is_a_usage_error(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "taken"))
    with pytest.raises(
        UsageError, match=r"cannot be downloaded \(NotADirectoryError.*copy it on every node to .*/taken/hub"
    ):
        build("DEFAULT")


# ---- files

TINY = f"{tiny_model.__module__}:{tiny_model.__name__}"


def tiny_state() -> "OrderedDict[str, Tensor]":
    seed_generators(98)
    return tiny_model(5).state_dict()


def build_tiny(path: Path) -> dict[str, Tensor]:
    return build(str(path), factory=TINY).state_dict()


def test_factory_model_loads_a_file_and_keeps_its_head(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / "own.pt")
    loaded, drawn = build_tiny(tmp_path / "own.pt"), build(None, factory=TINY).state_dict()
    assert differing(loaded, tiny_state()) == {"5.weight", "5.bias"}
    assert "5.weight" not in differing(loaded, drawn)
    with pytest.raises(
        UsageError, match=r"^model\.weights: 'DEFAULT' names weights of torchvision.*Name a weights file"
    ):
        build("DEFAULT", factory=TINY)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, ["'state_dict'"]),
        (lambda state: {"model": {"model_state_dict": state}}, ["'model'", "'model_state_dict'"]),
        (lambda state: {f"module.{key}": tensor for key, tensor in state.items()}, ["'module.'"]),
        (
            lambda state: {"state_dict": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}},
            ["'state_dict'", "'module.'", "'_orig_mod.'"],
        ),
        (lambda state: state, []),
    ],
)
def test_nesting_and_prefixes_are_removed_and_logged(
    wrap: Callable[[Any], Any], said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(wrap(tiny_state()), tmp_path / "own.pth")
    with caplog.at_level("INFO", logger="dreplica"):
        assert differing(build_tiny(tmp_path / "own.pth"), tiny_state()) == {"5.weight", "5.bias"}
    assert ("removed" in caplog.text) is bool(said)
    assert all(word in caplog.text for word in said)
    assert "7 tensors from" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"], (
        "a head that is not loaded is no warning"
    )


class Wrapped(nn.Module):
    """A model with a submodule named like the prefix of DistributedDataParallel."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.module = tiny_model(num_classes)


def test_prefix_of_the_model_is_kept(tmp_path: Path) -> None:
    torch.save({f"module.{key}": tensor for key, tensor in tiny_state().items()}, tmp_path / "own.pth")
    model = build(str(tmp_path / "own.pth"), factory=f"{__name__}:Wrapped")
    assert differing(model.module.state_dict(), tiny_state()) == {"5.weight", "5.bias"}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_misfits_are_listed_and_the_rest_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tiny_state()
    state["0.weight"] = torch.zeros(8, 1, 3, 3)
    state["1.running_var"] = torch.full((8,), torch.nan)
    state["1.weight"][3] = torch.nan
    state["0.bias"] = state["0.bias"].to_sparse()
    state["1.running_mean"] = state["1.running_mean"].to(torch.int8)
    del state["1.bias"]
    state["9.extra"] = torch.zeros(2)
    torch.save(state, tmp_path / "own.pth")
    drawn = build(None, factory=TINY).state_dict()
    loaded = build_tiny(tmp_path / "own.pth")
    assert differing(loaded, drawn) == {"1.weight"}
    for line in (
        "only 2 tensors of ",
        "did not fit: 0.weight: (8, 1, 3, 3) in the file, (8, 3, 3, 3) in the model",
        "did not fit: 0.bias: not a plain tensor in the file",
        "did not fit: 1.running_var: nothing but NaN in the file",
        "did not fit: 1.running_mean: int8 in the file, float32 in the model",
        "not in the file, left as drawn: 1.bias",
        "in the file, not in the model: 9.extra",
        "own.pth has NaN in 1.weight",
    ):
        assert line in caplog.text


def test_file_of_which_nothing_fits_is_a_usage_error(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(2, 3)}, tmp_path / "own.pth")
    with pytest.raises(
        UsageError, match=r"own\.pth' fits .* has conv\.weight \(2, 3\); the model has 0\.weight \(8, 3"
    ):
        build_tiny(tmp_path / "own.pth")
    # A file with only a head fits nothing: the head is not loaded.
    torch.save({key: tensor for key, tensor in tiny_state().items() if key.startswith("5.")}, tmp_path / "own.pth")
    with pytest.raises(UsageError, match="no tensor of"):
        build_tiny(tmp_path / "own.pth")


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped: bool, tmp_path: Path) -> None:
    path, done = tmp_path / "own.pth", tmp_path / "done"
    torch.save({**tiny_state(), "x": Malicious(done)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UsageError, match=r"own\.pth' holds more than tensors \(posix\.mkdir\).*torch\.save\(model\.state"
    ):
        build_tiny(path)
    assert not done.exists()
    torch.load(path, weights_only=False)
    assert done.exists(), "an unsafe load runs the code"


def write(path: Path, kind: str) -> None:
    torch.save(tiny_state(), path)
    content = path.read_bytes()
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "loop":
        path.unlink()
        path.symlink_to(path)
    elif kind == "absent":
        path.unlink()
    elif kind == "model":
        torch.save(tiny_model(5), path)
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "numbers":
        torch.save({"a": 1}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "page": b"<html>"}[kind])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("cut", "own.pth", "is damaged or not a file of torch.save.*Copy it again"),
        ("page", "own.pth", "is damaged or not a file of torch.save"),
        ("pickle", "own.pth", "is damaged or not a file of torch.save"),
        ("empty", "own.pth", "is empty. Copy it again"),
        ("folder", "own.pth", "is a folder. Name the file"),
        ("absent", "own.pth", "there is no such file. Copy it again, or name another file. Relative paths start at /"),
        ("loop", "own.pth", "cannot be read .*Too many levels"),
        ("model", "own.pth", "holds more than tensors .*Sequential"),
        ("list", "own.pth", "holds list without named tensors. Save a state_dict"),
        ("numbers", "own.pth", "holds dict without named tensors"),
        ("page", "own.safetensors", "is damaged or not a safetensors file"),
        ("cut", "own.safetensors", "is damaged or not a safetensors file"),
        ("absent", "own.safetensors", "there is no such file"),
    ],
)
def test_unusable_file_is_a_usage_error(kind: str, name: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / name, kind)
    with pytest.raises(UsageError, match=rf"^model\.weights: '{re.escape(str(tmp_path / name))}':? {words}"):
        build_tiny(tmp_path / name)


def test_unknown_suffix_is_a_usage_error(tmp_path: Path) -> None:
    write(tmp_path / "own.bin", "page")
    words = r"^model\.weights: expected a file name that ends in \.pth, \.pt, \.safetensors, got '.*own\.bin'"
    with pytest.raises(UsageError, match=words):
        build_tiny(tmp_path / "own.bin")


def test_damaged_cache_file_error_says_to_delete_it(cache: Path) -> None:
    put(cache, SHUFFLE, random_state(SHUFFLE)).write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"damaged .*Delete it to download it again"):
        build("DEFAULT")


# ---- whole jobs

JOB = ("--data.name=tests.fixtures:tiny_images", "--data.batch_size=16", "--train.epochs=1", "--schedule={}")


def test_replicas_train_offline_from_the_cache(cache: Path) -> None:
    state = random_state("mobilenet_v3_small")
    path = put(cache, "mobilenet_v3_small", state)
    job = run_job("--model.name=mobilenet_v3_small", "--model.weights=DEFAULT", *JOB)
    assert job.returncode == 0, job.output
    assert f"{len(state) - 2} tensors from {path}; the head 'classifier.3' is drawn from the seed" in job.output
    assert job.output.count(" tensors from ") == 1, "logged once"
    assert job.output.count("is not the file that torchvision publishes") == 1


@pytest.mark.parametrize(("seed", "agrees"), [("42", True), ("distinct", False)])
def test_replicas_train_from_a_file(seed: str, agrees: bool, tmp_path: Path) -> None:
    state = random_state(SHUFFLE)
    del state["conv1.1.bias"]
    torch.save({"state_dict": state}, tmp_path / "own.pth")
    weights = f"--model.weights={tmp_path / 'own.pth'}"
    job = run_job(f"--model.name={SHUFFLE}", weights, f"--seed.model={seed}", *JOB)
    assert job.returncode == 0, job.output
    assert job.output.count("left as drawn: conv1.1.bias") == 1, "logged once"
    first, second = job.report["fingerprints"]
    assert (first["weights"] == second["weights"]) is agrees


def test_missing_weights_end_all_replicas_with_one_error(tmp_path: Path) -> None:
    job = run_job(f"--model.name={SHUFFLE}", f"--model.weights={tmp_path / 'none.pth'}", *JOB)
    assert job.exitcodes == {0: 2, 1: 2}
    assert "model.weights" in job.output
    assert "Traceback" not in job.output
    assert not job.folder.exists()


def test_weights_digest_distinguishes_files(cache: Path, tmp_path: Path) -> None:
    """Without it, replicas with different files would diverge at the build with no known cause."""
    state = random_state(SHUFFLE)
    path = put(cache, SHUFFLE, state)
    named = RunConfig.model_validate({"model": {"name": SHUFFLE, "weights": "DEFAULT"}})
    filed = RunConfig.model_validate({"model": {"name": SHUFFLE, "weights": str(path)}})
    before = weights_digest(named)
    assert before is not None
    assert re.fullmatch("[0-9a-f]{32}", before)
    assert weights_digest(filed) == before
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert weights_digest(named) == weights_digest(filed) != before
    assert weights_digest(RunConfig.model_validate({"model": {"name": SHUFFLE}})) is None
