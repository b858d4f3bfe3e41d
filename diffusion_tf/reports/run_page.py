"""A page about a run as Markdown: key numbers, all measurements, and the paper's tables beside them."""

from collections.abc import Sequence
from typing import Any

from diffusion_tf.reports import paper_numbers as paper
from diffusion_tf.reports.captions import sampler_name
from diffusion_tf.reports.run_record import RunRecord, reference_name
from diffusion_tf.reports.summary import (
    changed_fields,
    key_numbers,
    main_scores,
    missing,
    score_text,
    title,
)

_LSUN_COLUMNS = {"lsun_bedroom": 1, "lsun_bedroom_large": 1, "lsun_church": 2, "lsun_cat": 3}


def to_markdown(record: RunRecord, picture: str) -> str:
    """The page as Markdown; `picture` is the path of its PNG, relative to the page."""
    sections = {
        "Training": _training_section(record),
        "Bits/dim (Eq. 5)": _likelihood_section(record),
        "Rate-distortion (Table 4, Figure 5)": _tables_section(record.rate_distortion),
        "Compressed files (Algorithms 3 and 4)": _tables_section(record.compression),
        "Sample quality": _evaluation_section(record),
        "Copying or learning": _neighbors_section(record.neighbors),
        "Beside the paper": paper_table(record),
        "Not measured": "\n".join(f"- {name}: `{command}`" for name, command in missing(record).items()),
        "Configuration": _configuration_section(record.config),
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
    numbers = _key_table(record)
    return f"# {title(record)}\n\n{numbers}![curves and samples]({picture})\n\n{body}\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _key_table(record: RunRecord) -> str:
    numbers = key_numbers(record)
    if not numbers:
        return ""
    with_paper = any(number.paper for number in numbers)
    rows = [
        [", ".join(filter(None, (number.name, number.note))), number.value, *([number.paper] if with_paper else [])]
        for number in numbers
    ]
    return f"{_markdown_table(['', 'this run', *(['paper'] if with_paper else [])], rows)}\n\n"


def _configuration_section(config: dict[str, Any]) -> str:
    """The fields that differ from the preset, and the others in small print."""
    changed = changed_fields(config)
    rest = ", ".join(f"{name}={value}" for name, value in config.items() if name not in changed)
    text = f"The preset {config['dataset']}, unchanged."
    if changed:
        text = f"The preset {config['dataset']} with:\n\n{_markdown_table(['field', 'value'], list(changed.items()))}"
    return f"{text}\n\n<sub>{rest}</sub>" if rest else text


def _training_section(record: RunRecord) -> str:
    if not record.metrics:
        return ""
    values = {name: value for name, value in record.metrics[-1].items() if name != "step"}
    return _markdown_table(list(values), [[f"{value:.4g}" for value in values.values()]])


def _subject(result: dict[str, Any]) -> str:
    """The images and the checkpoint of a measurement."""
    return f"{result['images']}, {result['num_images']:,} images, step {result['step']}"


def _likelihood_section(record: RunRecord) -> str:
    rows = []
    for result in record.likelihood.values():
        error = result["bits_per_dim_standard_error"]  # None for one image
        rows.append(
            [
                _subject(result),
                f"{result['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
                f"{result['prior_bits_per_dim']:.2e}",
                f"{result['middle_bits_per_dim']:.4f}",
                f"{result['decoder_bits_per_dim']:.4f}",
            ]
        )
    if not rows:
        return ""
    table = _markdown_table(["measured on", "bits/dim", "L_T", "L_1..L_T-1", "L_0"], rows)
    return table + _notes(list(record.likelihood.values()))


def _notes(results: Sequence[dict[str, Any]]) -> str:
    """What programs noted about their results, each note once."""
    notes = dict.fromkeys(f"- {name}: {text}" for result in results for name, text in result.get("notes", {}).items())
    return "\n\n" + "\n".join(notes) if notes else ""


def _tables_section(results: dict[str, dict[str, Any]]) -> str:
    """The table of each split, as the program wrote it."""
    sections = []
    for result in results.values():
        rows = [[f"{v:.5f}" if isinstance(v, float) else v for v in row.values()] for row in result["table"]]
        sections.append(f"{_subject(result)}\n\n{_markdown_table(list(result['table'][0]), rows)}")
    return "\n\n".join(sections)


def _evaluation_section(record: RunRecord) -> str:
    """One row for each evaluation, by step, sampler and number of its steps."""
    if not record.evaluations:
        return ""
    names = list(dict.fromkeys(name for line in record.evaluations for name in main_scores(line)))
    rows = [
        [line["step"], sampler_name(line), line["sampler_steps"], f"{line['num_samples']:,}"]
        + [reference_name(line)]
        + [score_text(line, name) if name in main_scores(line) else "" for name in names]
        for line in sorted(record.evaluations, key=lambda e: (e["step"], e["sampler"], e["sampler_steps"]))
    ]
    return _markdown_table(["step", "sampler", "steps", "samples", "against", *names], rows) + _notes(
        record.evaluations
    )


def _neighbors_section(result: dict[str, Any]) -> str:
    """The verdict about copies of training pictures, and the numbers that it rests on."""
    if not result:
        return ""
    rows = [
        ["samples", f"{result['num_samples']:,}", f"{result['median_distance']:.4g}"],
        ["held-out pictures", f"{result['num_held_out']:,}", f"{result['held_out_median_distance']:.4g}"],
    ]
    distance = f"median distance to the nearest of {result['num_images']:,} training pictures ({result['features']})"
    equal = f"{result['copies']} samples equal a training picture, {result['mirrored_copies']} a mirrored one."
    table = _markdown_table(["", "number", distance], rows)
    return f"{result['sentence']} {equal} `neighbors.png` shows the nearest pairs.\n\n{table}{_notes([result])}"


def paper_table(record: RunRecord) -> str:
    """The paper's Table 1 or 3 with a row for this run, and the source of each row; empty for other datasets."""
    dataset, best = record.config["dataset"], record.best_fid()
    fid, sources = "", []
    if best:
        fid = f"{best['fid']:.2f}"
        subject = f"step {best['step']}, {best['num_samples']:,} samples against {reference_name(best)}"
        sources = [f"evaluations.jsonl, {subject}"]
    if dataset == "cifar10":
        score = f"{best['inception_score']:.2f}" if best and "inception_score" in main_scores(best) else ""
        bits = {split: f"{result['bits_per_dim']:.2f}" for split, result in record.likelihood.items()}
        nll = f"<= {bits['test']}" if "test" in bits else ""
        nll += f" ({bits['train']})" if "train" in bits else ""
        sources += [f"likelihood_{split}.json" for split in bits]
        rows = [[*row, "paper, Table 1"] for row in paper.TABLE_1]
        return _markdown_table(
            ["model", "Inception Score", "FID", "NLL test (train), bits/dim", "source"],
            [*rows, ["**this run**", score, fid, nll, "; ".join(sources) or "not measured"]],
        )
    if dataset in _LSUN_COLUMNS:
        column = _LSUN_COLUMNS[dataset]
        rows = [[row[0], row[column], "paper, Table 3"] for row in paper.TABLE_3]
        ours = ["**this run**", fid, "; ".join(sources) or "not measured"]
        name = dataset.removesuffix("_large")
        table = _markdown_table(["model", f"FID, {name} 256x256", "source"], [*rows, ours])
        return f"{table}\n\nStarred: measured by StyleGAN2's authors; the others by their own."
    return ""
