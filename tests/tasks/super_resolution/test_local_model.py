"""BasicSR's own training command with ``model_type: LocalSRModel``."""

import errno
import json
import os
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import basicsr as basicsr_package
import pytest
import torch
import yaml
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from basicsr.utils import options as basicsr_options

from tasks.super_resolution.local_model import LocalSRModel
from tasks.super_resolution.network import check_scale
from tasks.super_resolution.startup import FILE, LINE, install, prepare, report
from tests.tasks.super_resolution.networks import write_images


def options(room: Path, **changes: Any) -> dict[str, Any]:
    """BasicSR's options for a tiny EDSR on made-up pairs; ``train__ema_decay=0.9`` changes a section's key."""
    sides = {"a.png": (32, 40), "b.png": (36, 32), "c.png": (32, 32)}
    write_images(room / "high", sides)
    write_images(room / "low", {name: (height // 2, width // 2) for name, (height, width) in sides.items()})
    pairs = {
        "type": "PairedImageDataset",
        "dataroot_gt": str(room / "high"),
        "dataroot_lq": str(room / "low"),
        "io_backend": {"type": "disk"},
    }
    made: dict[str, Any] = {
        "name": "run",
        "model_type": "LocalSRModel",
        "scale": 2,
        "num_gpu": 0,
        "manual_seed": 0,
        "local": {"blocks": 3, "auxiliary": "glcan"},
        "datasets": {
            "train": {
                **pairs,
                "name": "made",
                "gt_size": 16,
                "use_hflip": True,
                "use_rot": True,
                "use_shuffle": True,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 2,
                "dataset_enlarge_ratio": 10,
                "prefetch_mode": None,
            },
            "val": {**pairs, "name": "made"},
        },
        "network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 4, "upscale": 2},
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0.9,
            "optim_g": {"type": "Adam", "lr": 0.001, "weight_decay": 0, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": [4], "gamma": 0.5},
            "total_iter": 6,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 6,
            "save_img": True,
            "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}},
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 3, "use_tb_logger": False},
        "dist_params": {"backend": "gloo"},
    }
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = made
        for section in sections:
            target = target[section]
        target[key] = value
    return made


def built(room: Path, **changes: Any) -> SRModel:
    """The model that BasicSR builds of these options when it trains."""
    made = options(room, **changes)
    made.update(is_train=True, dist=False, rank=0, world_size=1)
    made["path"].update(models=str(room / "models"), training_states=str(room / "states"))
    for folder in ("models", "states"):
        (room / folder).mkdir(exist_ok=True)
    torch.manual_seed(0)
    if made["model_type"] != "LocalSRModel":
        del made["local"]  # other models refuse it
    model: SRModel = build_model(made)
    return model


def steps(model: SRModel, first: int, last: int) -> None:
    for number in range(first, last + 1):
        generator = torch.Generator().manual_seed(number)
        model.update_learning_rate(number)
        model.feed_data(
            {"lq": torch.rand(2, 3, 8, 8, generator=generator), "gt": torch.rand(2, 3, 16, 16, generator=generator)}
        )
        model.optimize_parameters(number)


def resumed(room: Path, iteration: int, **changes: Any) -> SRModel:
    """As BasicSR goes on: the network's weights first, then the training state."""
    model = built(room, path__pretrain_network_g=str(room / f"models/net_g_{iteration}.pth"), **changes)
    model.resume_training(torch.load(room / f"states/{iteration}.state", weights_only=True))
    return model


def state(model: SRModel) -> Mapping[str, torch.Tensor]:
    return model.net_g.state_dict()


def test_it_trains_by_blocks_and_saves_the_plain_network(tmp_path: Path) -> None:
    model = built(tmp_path)
    assert isinstance(model, LocalSRModel)
    assert [block.unit_names for block in model.blocks] == [
        ["stem", "body.0"],
        ["body.1", "body.2"],
        ["body.3", "body.end"],
    ]
    assert len(model.optimizers) == len(model.schedulers) == 3
    before = {name: tensor.clone() for name, tensor in state(model).items()}
    steps(model, 1, 2)
    assert list(model.get_current_log()) == ["l_0", "l_1", "l_pix"]
    assert all(not tensor.equal(before[name]) for name, tensor in state(model).items())
    model.save(0, 2)
    saved = torch.load(tmp_path / "models/net_g_2.pth", weights_only=True)
    assert saved.keys() == {"params", "params_ema"}
    assert saved["params"].keys() == before.keys()
    stock = built(tmp_path, model_type="SRModel", path__pretrain_network_g=str(tmp_path / "models/net_g_2.pth"))
    assert all(tensor.equal(state(model)[name]) for name, tensor in state(stock).items())


def test_one_block_is_srmodel_to_the_bit(tmp_path: Path) -> None:
    local, stock = built(tmp_path, local__blocks=1), built(tmp_path, model_type="SRModel")
    for model in (local, stock):
        steps(model, 1, 6)
    assert local.get_current_learning_rate() == stock.get_current_learning_rate() == [0.0005]
    assert all(tensor.equal(state(stock)[name]) for name, tensor in state(local).items())


def test_it_goes_on_with_the_same_blocks_to_the_bit(tmp_path: Path) -> None:
    whole = built(tmp_path)
    steps(whole, 1, 6)
    half = built(tmp_path)
    steps(half, 1, 3)
    half.save(0, 3)
    again = resumed(tmp_path, 3)
    steps(again, 4, 6)
    assert all(tensor.equal(state(whole)[name]) for name, tensor in state(again).items())
    assert again.get_current_learning_rate() == whole.get_current_learning_rate()


def test_it_goes_on_with_other_blocks_where_srmodel_asserts_equal_numbers(tmp_path: Path) -> None:
    three = built(tmp_path)
    steps(three, 1, 5)
    three.save(0, 5)
    two = resumed(tmp_path, 5, local__blocks=2)
    assert len(two.optimizers) == 2
    assert all(tensor.equal(state(three)[name]) for name, tensor in state(two).items())
    assert two.get_current_learning_rate() == three.get_current_learning_rate() == [0.0005]
    before, after = ({k: v for b in m.blocks for k, v in b.state()["optimizer"].items()} for m in (three, two))
    network = [name for name in before if not name.startswith("auxiliary")]
    assert network
    assert all(after[name].equal(before[name]) for name in network)
    assert not [name for name in after if name.startswith("auxiliary")], "those start fresh"
    steps(two, 6, 7)


def test_it_goes_on_with_other_auxiliary_networks(tmp_path: Path) -> None:
    direct = built(tmp_path)
    steps(direct, 1, 2)
    direct.save(0, 2)
    own = resumed(tmp_path, 2, local__auxiliary_tail="own")
    assert all(tensor.equal(state(direct)[name]) for name, tensor in state(own).items())
    steps(own, 3, 3)


def test_it_goes_on_where_srmodel_stopped(tmp_path: Path) -> None:
    stock = built(tmp_path, model_type="SRModel")
    steps(stock, 1, 3)
    stock.save(0, 3)
    one = resumed(tmp_path, 3, local__blocks=1)
    for model in (one, stock):
        steps(model, 4, 6)
    assert all(tensor.equal(state(stock)[name]) for name, tensor in state(one).items())


def test_srmodel_does_not_resume_a_state_of_blocks_and_says_which_way_works(tmp_path: Path) -> None:
    model = built(tmp_path)
    steps(model, 1, 1)
    model.save(0, 1)
    saved = torch.load(tmp_path / "states/1.state", weights_only=False)
    other = built(tmp_path, model_type="SRModel")
    said = "LocalSRModel wrote it, .* or start SRModel from the saved network: path.pretrain_network_g"
    with pytest.raises(ValueError, match=f"^path.resume_state: {said}"):
        other.resume_training(saved)
    built(tmp_path, model_type="SRModel", path__pretrain_network_g=str(tmp_path / "models/net_g_1.pth"))


def test_ranks_are_refused_where_basicsr_would_divide_by_no_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((basicsr_options, "init_dist"), (basicsr_options, "parse_options")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # ``prepare`` puts others in their places
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    monkeypatch.setattr(torch.UntypedStorage, "cuda", torch.UntypedStorage.cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prepare()
    (tmp_path / "options.yml").write_text(yaml.safe_dump(json.loads(json.dumps(options(tmp_path)))))
    words = ["train.py", "-opt", str(tmp_path / "options.yml"), "--launcher", "pytorch"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="^--launcher pytorch: BasicSR puts each rank on a GPU, and there is none"):
        basicsr_options.parse_options(str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^num_gpu: LocalSRModel trains on one device"):
        built(tmp_path)


def test_swinir_and_tiles_in_validation(tmp_path: Path) -> None:
    swin = {"type": "SwinIR", "upscale": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8}
    model = built(tmp_path, network_g={**swin, "img_size": 8, "mlp_ratio": 2, "upsampler": "pixelshuffle"})
    steps(model, 1, 1)
    model.feed_data({"lq": torch.rand(1, 3, 19, 13)})
    model.test()
    assert model.output.shape == (1, 3, 38, 26)
    assert model.net_g.training
    tiled = built(tmp_path, val={"tile": 16, "tile_overlap": 8, "metrics": {}})
    whole = built(tmp_path, val={"metrics": {}})
    for each in (tiled, whole):
        each.feed_data({"lq": torch.rand(1, 3, 40, 30, generator=torch.Generator().manual_seed(0))})
        each.test()
    assert torch.allclose(tiled.output, whole.output, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"local": None}, "local: None; give a section with blocks: 4"),
        ({"local__block": 4}, "local: unknown key 'block', did you mean 'blocks'"),
        ({"local__tail_part": 4}, "local: unknown key 'tail_part', did you mean 'tail_parts'"),
        ({"local__tail_parts": 0}, "local.tail_parts: 0; give a number of 1 or more"),
        ({"local__auxiliary_tail": "x"}, "local.auxiliary_tail: 'x'; give direct or own"),
        ({"local__precision": "bf16"}, "local.precision: BasicSR trains in fp32"),
        ({"local__blocks": 40}, "local.blocks: 40 blocks asked for, the network has 6 units"),
        ({"local": {"cut": ["body.9"]}}, "local.cut: 'body.9' is not a unit of this network"),
        ({"local__cut": ["body.2"]}, "local.blocks: has no effect beside local.cut; leave one of them out"),
        ({"train__gan_opt": {"type": "GANLoss"}}, "train.gan_opt: LocalSRModel does not read it; leave it out"),
        ({"train__optim_d": {"type": "Adam"}}, "train.optim_d: LocalSRModel does not read it"),
        ({"network_d": {"type": "UNet"}}, "network_d: LocalSRModel does not read it"),
        ({"model_type": "SRModel"}, "local: model_type SRModel has no blocks; set model_type: LocalSRModel"),
        ({"model_type": "SRGANModel"}, "local: model_type SRGANModel has no blocks; set model_type: LocalSRModel"),
        ({"local__auxiliary": "dgl"}, "'dgl' is not for super_resolution"),
        ({"dist": True}, "num_gpu: LocalSRModel trains on one device"),
        ({"train__perceptual_opt": {"type": "x"}}, "train.perceptual_opt: blocks learn from pixel_opt alone"),
        ({"train__pixel_opt": None}, "train.pixel_opt: missing"),
        ({"scale": 3, "network_g__type": "RRDBNet"}, "RRDBNet has no scale 3; it has 2 and 4"),
        ({"network_g__upscale": 4}, "network_g: it enlarges 4 times, and scale is 2; make them equal"),
        ({"datasets__train__gt_size": 17}, "datasets.train.gt_size: 17; this network and scale need a multiple of 2"),
        ({"val__tile": -1}, "val.tile: -1; give 0, or a whole number of pixels from 16 on"),
        ({"val__tile_overlap": "8"}, "val.tile_overlap: '8'; give 0"),
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = options(tmp_path, **{key: value for key, value in changes.items() if key != "dist"})
    made.update(is_train=True, dist=changes.get("dist", False), rank=0, world_size=1)
    with pytest.raises(ValueError, match=said):
        build_model(made)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def basicsr(room: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m basicsr.train`` as a user types it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "basicsr.train", *words]
    return subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_environment_knows_local_sr_model() -> None:
    installed = Path(sysconfig.get_path("purelib")) / FILE
    assert installed.is_file(), "make install-all writes it; so does python -m tasks.super_resolution.startup"
    assert installed.read_text() == LINE


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "net_g_latest.pth")


def mistake_of_basicsr() -> None:
    raise ValueError("not ours")


@pytest.mark.parametrize(
    ("fail", "line"),
    [
        (lambda: check_scale("EDSR", 5, ""), "error: "),
        (full_disk, "error: [Errno 28] No space left on device: 'net_g_latest.pth'"),
        (mistake_of_basicsr, ""),
    ],
)
def test_basicsrs_commands_end_in_one_line(
    fail: Callable[[], None], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake that LocalSRModel finds, and a disk that is full, ended in a traceback through BasicSR's code."""
    with pytest.raises((ValueError, OSError)) as caught:
        fail()
    with pytest.raises(SystemExit, match="2") if line else nullcontext():
        report(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert said.startswith(line or "Traceback")
    assert not line or said.count("\n") == 1


@pytest.mark.parametrize("given", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_basicsrs_own_command_trains_resumes_and_validates(given: bool, tmp_path: Path) -> None:
    """The command finds the state to resume from, or it is given; each start of it takes seconds."""
    file = tmp_path / "options.yml"
    name = f"test_{os.getpid()}_{time.time_ns()}"
    made = options(tmp_path, name=name)
    root = tmp_path / "experiments" / name  # and not where the package lies
    assert not (Path(basicsr_package.__file__).resolve().parents[1] / "experiments" / name).exists()
    file.write_text(yaml.safe_dump(json.loads(json.dumps(made))))
    done = basicsr(tmp_path, "-opt", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Block 0: stem ... body.0;" in done.stdout + done.stderr
    assert "# psnr:" in done.stdout + done.stderr
    assert (root / "models/net_g_latest.pth").is_file()
    if given:
        ended = basicsr(tmp_path, "-opt", str(file), "--auto_resume")
        assert "Resuming training from epoch: 0, iter: 6" in _said(ended)
        made["path"]["resume_state"] = str(root / "training_states/3.state")
    else:
        (root / "training_states/6.state").unlink()  # so that it finds the one before
    made["local"]["blocks"] = 2
    file.write_text(yaml.safe_dump(json.loads(json.dumps(made))))
    again = basicsr(tmp_path, "-opt", str(file), *(() if given else ("--auto_resume",)))
    assert again.returncode == 0, again.stderr[-2000:]
    assert "Resuming training from epoch: 0, iter: 3" in again.stdout + again.stderr
    assert (
        "The training state is of other blocks or auxiliary networks: these start fresh" in again.stdout + again.stderr
    )


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("python -m basicsr.train -opt x", True),
        ("python -u basicsr/test.py", True),
        ("python -m pytest tests/basicsr/test.py", False),
        ("python tool.py --log runs/basicsr.test", False),
        ("python -m pip install basicsr", False),
        ("torchrun basicsr/train.py", False),
        ("python", False),
    ],
)
def test_the_startup_line_is_for_basicsrs_commands_alone(command: str, wanted: bool) -> None:
    called = []
    words = "/bin/torchrun" if command.startswith("torchrun") else ""
    argv = ["python", words, *command.split()[1:]] if words else command.split()
    fake_sys = types.SimpleNamespace(orig_argv=argv)
    code = LINE.replace("import sys; ", "").replace("__import__('tasks.super_resolution.startup')", "called()")
    answer = types.SimpleNamespace(startup=types.SimpleNamespace(prepare=lambda: None))
    fake_sys.path = []
    eval(code, {"sys": fake_sys, "called": lambda: called.append(1) or types.SimpleNamespace(super_resolution=answer)})
    assert bool(called) == wanted


def test_it_installs_itself(tmp_path: Path) -> None:
    assert install(tmp_path).read_text() == LINE
    assert LINE.startswith("import ")
    assert LINE.count("\n") == 1, "Python reads such files line by line"
