"""The memory tables of GLCAN's field: python -m benchmarks.memory [--of detectors] [--json FILE]

ResNet-32 and ResNet-110 at batch 1024 (CIFAR-10), and ResNet-101, ResNet-152 and ResNeXt-101 32x8d at batch 256
(ImageNet, 224 px), on fake tensors, without GPU or data. GLCAN's blocks have equal numbers of units, or the cut with
the smallest peak ("cut for memory"). Published figures for the same network are shown beside ours, as a share of their
own end-to-end training: published bytes are what a GPU took, workspaces included, and not always at this batch size.

--of detectors: RetinaNet R50-FPN and R101-FPN at 800 x 1333 px, batch 2 and 16, beside MMDetection's own recomputation
(``with_cp``, which recomputes only the backbone's residual blocks).

--of super_resolution: EDSR-baseline at scales 2 and 4, batch 16 of 48 x 48 px, with its high-resolution end whole and
in four parts, and with each kind of auxiliary network.

--of denoisers: Stable Diffusion 1.5 at 512 px, batch 1 and 4, in fp32: its whole denoiser trained, and ArtBank's
prompts for it. Much of this memory is weights, gradients and optimizer state, which no cut changes, so the peak of the
activations, those of auxiliary networks included, is shown beside the overall peak.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import Config
from engine.memory.estimate import UNSEEN
from engine.memory.plan import smallest_cut
from engine.memory.report import header, write_json
from engine.memory.variant import END_TO_END, RECOMPUTED, Variant, estimate_variant, four_variants, local_variant
from engine.memory.work import Speed
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.console import console, progress_bar
from engine.utilities.device import choose_device
from engine.utilities.files import check_writable
from engine.utilities.page import write_page
from engine.utilities.sheet import Sheet
from engine.utilities.size import GIB
from tasks import find_task, load

CONFIGS = Path("tasks")
INFOPRO = "Wang et al., ICLR 2021"
GIGABYTE = 1e9


@dataclass(frozen=True)
class Network:
    """One network of the field, and published figures of its memory.

    ``variants`` are either auxiliary networks with numbers of blocks, or whole variants with end-to-end training first.
    ``published`` maps the name of a variant to (gigabytes, name in the source, source); ratios are to end-to-end.
    """

    title: str
    config: str
    overrides: tuple[str, ...]
    variants: Sequence[tuple[str, int]] | Sequence[Variant]
    published: dict[str, tuple[float, str, str]] = field(default_factory=dict)


TWO_AND_FOUR = [("glcan", 2), ("glcan", 4), ("dgl", 2), ("dgl", 4)]
IMAGENET = ("--data.batch", "256", "--train.accumulate", "1")
NETWORKS = [
    Network(
        "ResNet-32, CIFAR-10, batch 1024",
        "classification/configs/cifar10_resnet32_k16_glcan.yaml",
        (),
        [("glcan", 4), ("glcan", 16), ("dgl", 4), ("dgl", 16)],
    ),
    Network(
        "ResNet-110, CIFAR-10, batch 1024",
        "classification/configs/cifar10_resnet110_k55_glcan.yaml",
        (),
        [("glcan", blocks) for blocks in (2, 3, 4, 16, 55)] + [("dgl", 55)],
        {
            "end-to-end": (9.40, "end-to-end", INFOPRO),
            "end-to-end + recompute": (3.91, "checkpointing", INFOPRO),
            "glcan K=2, cut for memory": (5.38, "InfoPro K=2", INFOPRO),
            "glcan K=3, cut for memory": (4.22, "InfoPro K=3", INFOPRO),
            "glcan K=4, cut for memory": (3.52, "InfoPro K=4", INFOPRO),
        },
    ),
    Network(
        "ResNet-101, ImageNet, 224 px, batch 256",
        "classification/configs/imagenet_resnet101_k2_glcan.yaml",
        IMAGENET,
        TWO_AND_FOUR,
        {
            "end-to-end": (19.71, "end-to-end", INFOPRO),
            "glcan K=2, cut for memory": (12.06, "InfoPro K=2", INFOPRO),
        },
    ),
    Network(
        "ResNet-152, ImageNet, 224 px, batch 256",
        "classification/configs/imagenet_resnet152_k2_glcan.yaml",
        IMAGENET,
        TWO_AND_FOUR,
    ),
    Network(
        "ResNeXt-101 32x8d, ImageNet, 224 px, batch 256",
        "classification/configs/imagenet_resnet101_k2_glcan.yaml",
        (*IMAGENET, "--model.name", "timm:resnext101_32x8d"),
        TWO_AND_FOUR,
    ),
]


WITH_CP = Variant(
    "end-to-end + with_cp", (*END_TO_END.overrides, "--model.options", '{"model.backbone.with_cp": true}')
)
CONFIGURED = four_variants(Config())
DETECTORS = [
    Network(
        f"RetinaNet {name.upper()}-FPN, COCO, 800 x 1333 px, batch {batch}",
        f"detection/configs/coco_retinanet_{name}_k4_glcan.yaml",
        ("--data.batch", str(batch)),
        [END_TO_END, WITH_CP, *CONFIGURED[1:]],
    )
    for name in ("r50", "r101")
    for batch in (2, 16)
]


def _with(variant: Variant, name: str, *overrides: str) -> Variant:
    return Variant(name, (*variant.overrides, *overrides))


LOCAL, LOCAL_RECOMPUTED = CONFIGURED[2:]
ONE_PART = ("--model.tail_parts", "1")
_OWN = ("--local.auxiliary", "glcan")
UPSCALERS = [
    Network(
        f"EDSR-baseline, scale {scale}, batch 16 of 48 x 48 px",
        "super_resolution/configs/div2k_edsr_x4_k4_glcan.yaml",
        ("--model.scale", str(scale)),
        [
            _with(END_TO_END, "end-to-end", *ONE_PART),
            _with(RECOMPUTED, "end-to-end + recompute", *ONE_PART),
            _with(END_TO_END, "end-to-end, tail in 4 parts"),
            _with(RECOMPUTED, "end-to-end + recompute, tail in 4 parts"),
            *(_with(LOCAL, f"glcan K={count}, tail in 4 parts", "--local.blocks", str(count)) for count in (2, 4, 17)),
            _with(LOCAL, "glcan K=4, tail whole", *ONE_PART),
            _with(LOCAL, "glcan K=4, own tails in auxiliary networks", "--model.auxiliary_tail", "own"),
            _with(LOCAL, "glcan K=4, one unit, tail in 4 parts", *_OWN, "--local.auxiliary.depth", "1"),
            _with(LOCAL, "glcan K=4, half as wide, tail in 4 parts", *_OWN, "--local.auxiliary.width", "0.5"),
            _with(LOCAL, "local_sr K=4, tail in 4 parts", "--local.auxiliary", "local_sr"),
            _with(LOCAL_RECOMPUTED, "glcan K=4 + recompute, tail in 4 parts"),
        ],
    )
    for scale in (2, 4)
]
SD15 = (
    *("--model.pretrained", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--data.size", "512"),
    *("--data.resize", "512", "--local.precision", "fp32", "--local.schedule", "sequential"),
)
SD15_CUTS = {  # by tools/plan.py's search for the smallest peak of full training at batch 4
    2: ["up1.0"],
    4: ["down2.1", "up0.2", "up3.0"],
    8: ["down0.1", "down1.1", "down3.1", "up0.1", "up1.1", "up2.2", "up3.1"],
}
DENOISERS = [
    Network(
        f"Stable Diffusion 1.5, {what}, 512 px, batch {batch}",
        f"style_transfer/{config}",
        (*SD15, "--data.batch", str(batch)),
        [
            END_TO_END,
            RECOMPUTED,
            *(_with(LOCAL, f"glcan K={count}", "--local.cut", json.dumps(cut)) for count, cut in SD15_CUTS.items()),
            _with(LOCAL_RECOMPUTED, "glcan K=4 + recompute", "--local.cut", json.dumps(SD15_CUTS[4])),
        ],
    )
    for what, config in (
        ("full training", "denoiser/configs/denoiser_tiny.yaml"),
        ("ArtBank's prompts", "artbank/configs/artbank_sd15.yaml"),
    )
    for batch in (1, 4)
]
KINDS = {
    "classifiers": NETWORKS,
    "detectors": DETECTORS,
    "super_resolution": UPSCALERS,
    "denoisers": DENOISERS,
}


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--of", choices=KINDS, default="classifiers", help="kind of networks")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with the tables to this file")
    known = parser.parse_args(list(argv))
    check_writable(known.json, known.html)
    torch.set_num_threads(1)
    speed, rows, sheets = Speed.measure_apart(choose_device("auto")), list[dict[str, object]](), list[Sheet]()
    with progress_bar() as bar:
        for network in bar.track(KINDS[known.of], description="networks"):
            found, sheet = _network(network, speed)
            sheet.show()
            rows += found
            sheets.append(sheet)
    notes = ["predicted, on fake tensors", UNSEEN]
    if known.of == "classifiers":
        notes.append(f"published: {INFOPRO}")
    for line in notes:
        console.print(line)
    about = header("Memory of the field's networks", argv, 1, "auto")
    if known.json:
        write_json(known.json, about, rows)
    if known.html:
        write_page(known.html, about, sheets, notes)


def _network(network: Network, speed: Speed) -> tuple[list[dict[str, object]], Sheet]:
    words = ["--config", str(CONFIGS / network.config), *network.overrides]
    config, _ = load(words)
    variants = [each for each in network.variants if isinstance(each, Variant)] or [END_TO_END, RECOMPUTED]
    named = [each for each in network.variants if not isinstance(each, Variant)]
    for name, blocks in named:
        variants.append(local_variant(config, name, blocks))
        if name == "glcan" and blocks < 16:
            cut = smallest_cut(config, find_task(config.task).build, blocks, speed)
            variants.append(Variant(f"glcan K={blocks}, cut for memory", ("--local.cut", json.dumps(cut))))
    if named:
        largest = max(blocks for _, blocks in named)
        variants.append(local_variant(config, "glcan", min(largest, 16), recompute=True))
    estimates = [estimate_variant(variant, words, load, speed) for variant in variants]
    base, rows, lines = estimates[0], list[dict[str, object]](), list[list[str]]()
    for variant, estimate in zip(variants, estimates, strict=True):
        size, published = estimate.footprint.peak_bytes, network.published.get(variant.name)
        share, time = size / base.footprint.peak_bytes, estimate.step_seconds / base.step_seconds
        beside = ""
        if published:
            beside = f"{published[0] / network.published['end-to-end'][0]:.0%} ({published[1]}, {published[0]:.2f} GB)"
        active = estimate.footprint.highest("activations", "auxiliary")
        of_whole = active / base.footprint.highest("activations", "auxiliary")
        shown = [f"{active / GIB:.2f}", f"{of_whole:.0%}"]
        lines.append([variant.name, f"{size / GIB:.2f}", f"{share:.0%}", *shown, f"{time:.2f}", beside])
        rows.append(
            {
                "network": network.title,
                "variant": variant.name,
                "peak_bytes": size,
                "by_category_bytes": estimate.footprint.peak,
                "by_block_bytes": estimate.footprint.by_block_bytes,
                "memory_ratio": share,
                "activation_bytes": active,
                "activation_ratio": of_whole,
                "predicted_time_ratio": time,
                "published_bytes": published[0] * GIGABYTE if published else None,
                "published_of": f"{published[1]}: {published[2]}" if published else None,
            }
        )
    columns = ["variant", "peak GiB", "of end-to-end", "activations GiB", "of end-to-end's", "time of end-to-end"]
    columns.append("published, of its end-to-end")
    if not network.published:
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    return rows, Sheet(network.title, columns, lines)


if __name__ == "__main__":
    run_tool(main)
