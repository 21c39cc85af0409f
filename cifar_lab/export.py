"""Export a checkpoint as an ONNX model with its model card; python -m cifar_lab.export."""

from __future__ import annotations

import html
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab import cli
from cifar_lab.recipe import InputError

if TYPE_CHECKING:
    from cifar_lab.checkpoint import Record
    from cifar_lab.classifier import ImageClassifier
    from cifar_lab.recipe import Recipe

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # of a probability, between PyTorch and ONNX Runtime
BATCHES = (1, 10)  # images at once, on which they are compared
MODEL, CARD = "model.onnx", "MODEL_CARD.md"
INPUT = "`images`: uint8 (N, 3, 32, 32), RGB, 0 to 255, any N; the normalization is inside the model"
OUTPUT = "`probabilities`: float32 (N, {classes}), the softmax of the logits, in the order of the classes"
DATA = {
    "cifar10": "CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.",
    "digits": "scikit-learn's digits: 1,797 scans of 8x8 pixels, enlarged to 32x32 RGB; 360 of them, stratified, are "
    "the test set.",
    "folder": "A folder of images a class, in a training and a test part, resized to 32x32 RGB.",
}
CIFAR10_LIMITS = """
- About 3% of CIFAR-10's test images have a near-duplicate among its training images (Barz and Denzler 2020), which
  flatters the test accuracy; about 0.5% of its test labels are wrong (Northcutt et al. 2021).
- CIFAR-10's images come from web searches for English nouns, through the 80 Million Tiny Images, withdrawn in 2020 for
  offensive content. They show what such a search returned before 2009, mostly one centered object. How the model judges
  images of another kind was not measured."""
EXAMPLE = """\
import json
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{file}")
image = Image.open("image.png").convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
images = np.asarray(image).transpose(2, 0, 1)[None]
probabilities = session.run(["probabilities"], {{"images": images}})[0][0]
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
print(classes[probabilities.argmax()], probabilities.max())
"""
CARD_TEXT = """\
# {arch} on {dataset}

{headline}

## Model

{about} {parameters:,} parameters.{averaged}

## Data

{data} {split}
Each channel is normalized by mean {mean} and standard deviation {std}, of values in 0 to 1.
Classes, in the order of the output: {classes}.

## Training

{training}
The recipe, as `python -m cifar_lab.train --config` reads it:

```yaml
{recipe}
```

## Results

{results}

## Intended use

Telling {count} classes apart in small images like those it was trained on, to teach, to compare recipes, to try out a
deployment. It was made for no use where a wrong answer does harm.

## Limits

- It sees 32x32 pixels: a larger image is reduced to that, and loses its details.
- It knows {count} classes and no other: every image is given one of them, and the probabilities sum to 1 even where
  the image shows none.
- Its probabilities are a softmax's, and were not recalibrated. Nothing was measured but the figures above.{limits}

## Input and output

- {input}.
- {output}.
- The model's metadata holds the classes and the recipe as JSON, and the checkpoint's sha256.

```python
{example}
```

Images that are transparent, turned by their EXIF or of 16 bits are read as by `cifar_lab.dataset.read_image`.

## Provenance

- `{file}`: sha256 {digest}
- the checkpoint `{checkpoint}`: sha256 {checkpoint_digest}
- exported with {versions}
- on {batches} images at once, no probability was further than {largest:.1e} from PyTorch's

```
{command}
```
"""


def to_onnx(model: ImageClassifier, metadata: Mapping[str, str]) -> bytes:
    """A classifier as an ONNX model in 32 bits, as INPUT and OUTPUT say, by the weights that `cifar_lab.evaluate` uses.

    Args:
        model: from `cifar_lab.fit.restore`.
        metadata: kept in the model, under its keys.
    """
    import torch
    from torch import nn

    from cifar_lab.dataset import SIDE

    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        program = torch.onnx.export(
            nn.Sequential(model, nn.Softmax(1)).eval(),
            (torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8),),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=(batch,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # The exporter notes in each node the lines of code that it came from, with this machine's paths.
    for node in program.model.graph:
        node.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    exported: bytes = program.model_proto.SerializeToString()
    return exported


def difference(model: ImageClassifier, exported: bytes) -> float:
    """The largest difference of a probability between PyTorch and ONNX Runtime, over batches of BATCHES images.

    The images are noise from coarse to fine, so that not all of them are equally strange to the network.
    """
    import numpy as np
    import onnxruntime
    import torch
    import torch.nn.functional as F

    from cifar_lab.dataset import SIDE

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(2, 3, side, side, generator=generator) for side in (SIDE, 16, 8, 4, 2)]
    images = torch.cat([F.interpolate(part, (SIDE, SIDE), mode="bilinear") for part in noise])
    found = []
    for count in BATCHES:
        batch = (images[:count] * 255).to(torch.uint8)
        with torch.no_grad():
            wanted = model(batch).softmax(1).numpy()
        (answer,) = session.run(["probabilities"], {"images": batch.numpy()})
        found.append(np.abs(answer - wanted).max())
    return float(np.max(found))


def record_of_run(checkpoint: Path, digest: str) -> tuple[Record, Path]:
    """What best.json of a checkpoint's run says, if it speaks of this very checkpoint, else nothing; and its folder.

    The run's folder is at most three above the checkpoint; where none speaks of it, it is the checkpoint's own.
    """
    from cifar_lab.files import read_json

    parents = checkpoint.absolute().parents
    for folder in parents[:3]:
        try:
            best = read_json(folder / "best.json")
        except (OSError, ValueError):
            continue
        if best.get("sha256") == digest:
            return best, folder
    return {}, parents[0]


def model_card(
    model: ImageClassifier, who: Record, best: Record, run: Path, *, file: Path, largest: float, command: str
) -> str:
    """The model card, in Markdown: what the model is, from what, how good, and what it is not for.

    Args:
        model: from `cifar_lab.fit.restore`.
        who: its `cifar_lab.fit.identity`.
        best: what best.json says of it, or nothing; from `record_of_run`.
        run: the folder of best.json and per_class.csv.
        file: the ONNX model.
        largest: the `difference` that was found.
        command: what made it.
    """
    import yaml

    from cifar_lab.files import sha256
    from cifar_lab.models import network_class
    from cifar_lab.report import headline

    recipe = model.recipe
    mean, std = (" / ".join(f"{v:.4f}" for v in values.flatten().tolist()) for values in (model.mean, model.std))
    training = "How it was trained is not recorded beside it."
    if "epoch" in best:  # else it speaks of an evaluation only
        training = f"On {best['hardware']}, with {_versions(best)}:\n\n```\n{best['command']}\n```\n"
    return CARD_TEXT.format(
        arch=recipe.arch,
        dataset=recipe.dataset,
        headline=headline(best) if best else "Not tested: no best.json of a run speaks of this checkpoint.",
        about=(inspect.getdoc(sys.modules[network_class(recipe.arch).__module__]) or "").splitlines()[0],
        parameters=sum(p.numel() for p in model.network.parameters()),
        averaged=f" Its weights are the moving average of the training's, decay {recipe.ema}." if recipe.ema else "",
        data=DATA[recipe.dataset],
        split=_split(recipe),
        mean=mean,
        std=std,
        classes=", ".join(map(_escaped, model.classes)),
        training=training,
        recipe=yaml.safe_dump(who["recipe"], sort_keys=False).strip(),
        results=_results(best, run, recipe),
        count=len(model.classes),
        limits=CIFAR10_LIMITS if recipe.dataset == "cifar10" else "",
        input=INPUT,
        output=OUTPUT.format(classes=len(model.classes)),
        example=EXAMPLE.format(file=file.name).strip(),
        file=file.name,
        digest=sha256(file),
        checkpoint=Path(who["checkpoint"]).name,
        checkpoint_digest=who["sha256"],
        versions=_versions(who),
        batches=" and ".join(map(str, BATCHES)),
        largest=largest,
        command=command,
    )


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def _split(recipe: Recipe) -> str:
    """Which images trained and which chose."""
    limit = f" Only {recipe.limit_train:,} training images were used (limit_train)." if recipe.limit_train else ""
    if not recipe.validated:
        return f"No image of the training set validated: the last epoch counts. The test set chose nothing.{limit}"
    if recipe.folds:
        held = f"Fold {recipe.fold} of {recipe.folds}, stratified, counted from 0 (split_seed {recipe.split_seed}),"
    else:
        held = f"{recipe.val_fraction:.0%} of the training set, stratified (split_seed {recipe.split_seed}),"
    return f"{held} validated and chose the epoch; the test set did neither.{limit}"


def _results(best: Record, run: Path, recipe: Recipe) -> str:
    """Validation and test figures of this checkpoint with their intervals, and class by class."""
    from cifar_lab import calibration
    from cifar_lab.compare import read_answers
    from cifar_lab.files import read_csv
    from cifar_lab.page import percent
    from cifar_lab.report import confidences, headline

    def interval(record: Mapping[str, Any], part: str) -> str:
        low, high, n = (record[f"{part}_{name}"] for name in ("low", "high", "n"))
        return f" ({percent(low, 2)} to {percent(high, 2)}, Wilson 95%, n = {n:,})"

    if not best:
        return "None is recorded beside the checkpoint. Not tested."
    lines = []
    if best.get("val_acc") is not None:
        chosen = interval(best, "val") if "val_low" in best else ""
        lines = [f"- Validation accuracy {percent(best['val_acc'], 2)}{chosen}, at epoch {best['epoch']}."]
    elif "epoch" in best:
        lines = [f"- Trained without validation, to epoch {best['epoch']}."]
    if "test_acc" not in best:
        return "\n".join([*lines, "- Not tested."])
    lines.append(f"- Test accuracy of this checkpoint {percent(best['test_acc'], 2)}{interval(best, 'test')}.")
    if len(best["test_acc_seeds"]) > 1:
        lines.append(f"- Over the seeds of its recipe: {headline(best)}")
    if (run / "test_predictions.csv").exists():
        said, _ = read_answers(run)
        bins = calibration.reliability(confidences(said)[1], (said.label == said.prediction).to_numpy())
        error = percent(calibration.expected_error(bins), 2)
        lines.append(f"- Expected calibration error {error}, over {calibration.BINS} bins of equal width.")
    if recipe.precision != "32":
        lines.append(f"- Measured in {recipe.precision}; the exported model computes in 32 bits.")
    classes = read_csv(run / "per_class.csv")
    if classes:
        lines += ["", "| class | n | correct | test accuracy | low | high |", "|---|---:|---:|---:|---:|---:|"]
    for row in classes:
        shares = (percent(float(row[name])) if row[name] else "" for name in ("accuracy", "low", "high"))
        lines.append(f"| {_escaped(row['class'])} | {row['n']} | {row['correct']} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _escaped(name: str) -> str:
    """A class's name as Markdown shows it, in a table too."""
    return html.escape(name).replace("|", "\\|")


def main(argv: Sequence[str]) -> int:
    """The command: an ONNX model and its card, left only if it answers as PyTorch does."""
    parser = cli.Parser(prog="python -m cifar_lab.export", description=(__doc__ or ""), allow_abbrev=False)
    parser.add_argument("checkpoint", help="a .ckpt file that cifar_lab.train or tune.asha left")
    parser.add_argument("--output", help=f"folder, or file *.onnx, beside which goes {CARD}; default: the run's folder")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the model's path")
    parser.add_argument(
        "--json", action="store_true", help="print JSON alone: model, card, how far it is from PyTorch's"
    )
    asked = parser.parse_args(list(argv))
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"Exporting needs {', '.join(missing)}, which the extra `onnx` installs: pip install -e '.[onnx]'."
        )
    from cifar_lab.files import size, write_atomically
    from cifar_lab.fit import identity, restore

    checkpoint = Path(asked.checkpoint)
    model = restore(checkpoint)
    who = identity(model, checkpoint)
    who["versions"] |= {name: version(name) for name in PACKAGES}
    who["recipe"]["data_dir"] = None  # a path of this machine
    best, run = record_of_run(checkpoint, who["sha256"])
    place = Path(asked.output) if asked.output else run
    file = place if place.suffix == ".onnx" else place / MODEL
    card = file.with_name(CARD)
    for existing in (file, card):
        if existing.exists():
            raise InputError(
                f"output: {str(existing)!r} exists already, and results are never overwritten. Name another folder."
            )
    above = next(folder for folder in file.absolute().parents if folder.exists())
    cli.make_folder(above, asked.output or str(run), "output")
    contract = {"input": INPUT, "output": OUTPUT.format(classes=len(model.classes))}
    kept = {name: value for name, value in who.items() if name != "checkpoint"}
    exported = to_onnx(model, contract | {k: v if isinstance(v, str) else json.dumps(v) for k, v in kept.items()})
    largest = difference(model, exported)
    if not largest <= TOLERANCE:  # nor if it is no number
        print(
            cli.paragraph(
                f"error: the exported model's probabilities are up to {largest:.2g} from PyTorch's, more than "
                f"{TOLERANCE:g}. Nothing was written."
            ),
            file=sys.stderr,
        )
        return cli.FAILED
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, exported)
        command = cli.command("cifar_lab.export", argv)
        write_atomically(card, model_card(model, who, best, run, file=file, largest=largest, command=command))
    except OSError as error:
        raise InputError(f"output: {str(file)!r} cannot be written ({error.strerror}).") from error
    if asked.json:
        places = {"model": os.path.relpath(file), "card": os.path.relpath(card), "bytes": len(exported)}
        print(cli.as_json(places | {"largest_difference": largest} | kept))
        return cli.DONE
    if not asked.quiet:
        tried = " and ".join(map(str, BATCHES))
        print(f"On {tried} images at once, no probability is further than {largest:.1e} from PyTorch's.")
        print(f"{os.path.relpath(card)}\n{size(len(exported))} in", end=" ")
    print(os.path.relpath(file))
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
