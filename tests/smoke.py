"""A few steps of everything a task offers: python -m tests.smoke --config tasks/TASK/configs/smoke.yaml"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine.config import run_tool, task_name
from engine.device import choose_device
from tools import evaluate, export, memory, plan, train

VARIANTS = {
    "end-to-end": ["--local.schedule", "end_to_end"],
    "end-to-end, checkpointing": ["--local.schedule", "end_to_end", "--local.checkpoint", "true"],
    "glcan": [],
    "greedy": ["--local.auxiliary", "greedy"],
    "glcan, checkpointing": ["--local.checkpoint", "true"],
    "glcan, offload": ["--local.offload", "true"],
    "glcan, bf16": ["--local.precision", "bf16"],
    "glcan, fp16": ["--local.precision", "fp16"],
    "glcan, accumulation and clipping": ["--train.accumulate", "2", "--optimizer.clip_norm", "1"],
    "glcan, compiled": ["--local.compile", "true"],
}


PROMPTS = {
    # Each block would scale its share of the prompts' gradient by a scale of its own.
    "glcan, fp16": None,
    "glcan, compiled": None,  # as the denoiser's
}
OF_TASK: dict[str, Mapping[str, list[str] | None]] = {
    "classification": {"dgl": ["--local.auxiliary", "dgl"]},
    "detection": {
        "levels": ["--local.auxiliary", "levels"],
        # Every size is compiled for anew, which takes minutes.
        "glcan, compiled": ["--local.compile", "true", "--data.sizes", "[[128, 128]]", "--local.cut", "[neck]"],
    },
    "style_transfer/scin": {
        # Each block would scale its share of the Perception Encoder's gradient by a scale of its own.
        "glcan, fp16": ["--local.precision", "fp16", "--model.style_encoder", "vgg"],
        "glcan, compiled": ["--local.compile", "true", "--local.cut", "[stage3]"],  # two blocks to compile, not four
        "AdaIN in SCIN's place": ["--model.normalisation", "adain", "--local.auxiliary.width", "1"],
        "AdaIN's network": [
            *("--model.transfer", "adain", "--model.normalisation", "none", "--model.style_encoder", "vgg"),
            *("--loss.adversarial", "0", "--loss.contrastive", "0", "--loss.identity", "0"),
        ],
    },
    "style_transfer/denoiser": {
        "glcan, fp16": ["--local.precision", "fp16", "--model.time", "frozen"],
        # On a CPU minutes of C++ for each of its layers; tests/tasks/style_transfer/denoiser traces them.
        "glcan, compiled": None,
        "LoRA": ["--model.trains", "lora"],
    },
    "style_transfer/artbank": {**PROMPTS, "released": ["--prompt.form", "released"]},
    "style_transfer/lsast": {**PROMPTS, "released": ["--prompt.form", "released"]},
    "super_resolution": {
        "local_sr": ["--local.auxiliary", "local_sr"],
        "glcan, tails in parts, own in auxiliary networks": [
            *("--model.tail_parts", "2", "--model.auxiliary_tail", "own"),
        ],
    },
}

EXPORTS = {
    "style_transfer/denoiser": "checkpoint",
    "style_transfer/artbank": "bank.safetensors",
    "style_transfer/lsast": "bank.safetensors",
}


def main(argv: Sequence[str]) -> None:
    task = task_name(argv)
    chosen = {**VARIANTS, **OF_TASK[task]}
    variants = {name: overrides for name, overrides in chosen.items() if overrides is not None}
    with tempfile.TemporaryDirectory() as room:
        for number, (name, overrides) in enumerate(variants.items()):
            print(f"-- {name}", flush=True)
            output = ["--output.root", room, "--output.name", str(number)]
            train.main([*argv, *overrides, *output])
            # Going on from the end only evaluates; the point is that the checkpoint loads.
            train.main([*argv, *overrides, *output, "--train.resume", "auto"])
            run = Path(room) / str(number)
            evaluate.main(["--run", str(run)])
            out = "lora.safetensors" if "lora" in overrides else EXPORTS.get(task, "model.pth")
            export.main(["--run", str(run), "--out", str(run / out)])
        print("-- memory: measured, planned for", flush=True)
        memory.main(["measure", *argv, "--steps", "1", "--html", str(Path(room) / "memory.html")])
        plan.main([*argv, "--memory", "1GiB", "--out", str(Path(room) / "plan.yaml")])
    print(f"{len(variants) + 2} passed, 0 failed, on {choose_device('auto')}, torch {torch.__version__}")


if __name__ == "__main__":
    run_tool(main)
