"""The facts of a deletion record, as a run leaves them."""

import copy

DIGEST = "a" * 64


def measures(probability, accuracy, strength, likelihood):
    return {
        "rows": 8,
        "probability": probability,
        "perplexity": 1 / probability,
        "memorization_accuracy": accuracy,
        "extraction_strength": strength,
        "extracted": 0.0,
        "extraction_likelihood_10": likelihood,
    }


def curve(*probabilities):
    return [{"step": 2 * index, "rest_probability": value} for index, value in enumerate(probabilities)]


def extraction(forget, holdout):
    return {
        "settings": {"samples": 8},
        "sets": {
            name: {"prompt": {"rows": 8, "whole": share / 2}, "any way": {"rows": 8, "whole": share}}
            for name, share in (("forget", forget), ("holdout", holdout))
        },
        "not_tested": {"forget": {"paraphrased": "no row has a paraphrase"}},
    }


FACTS = {
    "schema": 1,
    "outcome": "forgotten",
    "request": {
        "path": "/requests/17.yaml",
        "reference": "ER-2026-17",
        "requester": "A. Example",
        "model": "/models/small",
        "forget": {
            "data": "/data/rows.jsonl",
            "ids": 0,
            "id_column": "id",
            "contains": True,
            "matches": False,
            "columns": ["question"],
        },
        "utility_floor": 0.9,
        "attacks": ["extract", "mia", "relearn", "quantise"],
    },
    "times": {
        "begin": "2026-01-02T03:04:05+00:00",
        "end": "2026-01-02T03:08:05+00:00",
        "seconds": {"before": 20.5, "training": 100.0, "attacks": 119.5},
    },
    "machine": {"cpu": "a processor", "device": "cpu", "threads": 2, "memory": 2**34},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2"},
    "inputs": {
        "model": {"name": "/models/small", "revision": None, "files": {"model.safetensors": DIGEST}},
        "data": {
            "forget": {"source": "/data/rows.jsonl", "sha256": DIGEST},
            "holdout": {"source": "/data/others.jsonl", "sha256": DIGEST},
        },
        "code": {"version": "0.1.0", "sha256": DIGEST},
    },
    "rows": {
        "selected": 8,
        "total": 400,
        "indices": [3, 4, 5, 6, 7, 8, 9, 11],
        "near_duplicates": {
            "included": True,
            "forget_rows": {"asked": 8, "with_near_duplicates": 9},
            "sets": {"rest": {"rows": 392, "near": 1, "taken_along": 1}, "retain": {"rows": 40, "near": 1}},
            "duplicates": [
                {"set": "rest", "index": 17, "forget_index": 2, "kind": "near", "similarity": 0.81},
                {"set": "retain", "index": 7, "forget_index": 2, "kind": "exact", "similarity": 1.0},
            ],
        },
    },
    "retain": {"rows": 72, "trained": 58, "given": {"rows": 40}, "sampled": {"rows": 32}},
    "knowledge": {"verdict": "known", "reasons": ["probability 0.998 > 0.05"]},
    "measures": {
        "before": {
            "forget": measures(0.998, 1.0, 0.95, 0.97),
            "retain": measures(0.997, 1.0, 0.94, 0.96),
            "holdout": measures(0.004, 0.3, 0.05, None),
        },
        "after": {
            "forget": measures(0.003, 0.25, 0.04, 0.0),
            "retain": measures(0.95, 0.98, 0.9, 0.93),
            "holdout": measures(0.003, 0.28, 0.05, None),
        },
        "control": {"forget": measures(0.002, 0.24, 0.04, 0.0)},
    },
    "limits": {
        "memorization_accuracy": {"limit": 0.3, "before": 1.0, "after": 0.25, "met": True},
        "extraction_strength": {"limit": 0.05, "before": 0.95, "after": 0.04, "met": True},
    },
    "probe": {"before": {"arithmetic": 0.5}, "after": {"arithmetic": 0.48}, "relative": 0.96},
    "training": {
        "steps": 12,
        "chosen_step": 10,
        "reason": "all limits are met",
        "history": [
            {
                "step": step,
                "epoch": step / 5,
                "forget_memorization_accuracy": 1.0 - step / 13,
                "forget_extraction_strength": 0.95 - step / 13,
                "retain_probability": 1.0 - step / 200,
            }
            for step in range(0, 13, 2)
        ],
        "utility": {"original": {"retain": 0.99}, "floors": {"retain": 0.9}, "kept": 0.96},
        "training": {"learning_rate": 0.002, "lora_rank": 8},
    },
    "attacks": {
        "before": {"extract": extraction(1.0, 0.0), "mia": {"scores": {"loss": {"auc": 0.99}}}},
        "after": {
            "extract": extraction(0.125, 0.05),
            "mia": {"scores": {"loss": {"auc": 0.52}, "zlib": {"auc": None}}},
            "relearn": {
                "taught_rows": [0, 2, 4, 7],
                "unlearned": {"best": 0.4, "curve": curve(0.003, 0.1, 0.4)},
                "control": {"kind": "hold-out", "best": 0.003, "curve": curve(0.002, 0.0025, 0.003)},
                "not_tested": {"steps_to_half": "no original model was given"},
            },
            "quantise": {
                "roundings": {
                    "not rounded": {"forget": {"probability": 0.9}, "retain": {"probability": 0.8}},
                    "8 bits": {"forget": {"probability": 0.03}, "retain": {"probability": 0.79}},
                    "4 bits": {"forget": {"probability": 0.02}, "retain": {"probability": 0.7}},
                },
                "not_tested": {},
            },
        },
    },
    "serving": {
        "target": "vllm",
        "rank": 16,
        "error": {"relative_frobenius": 0.01},
        "problems": [],
        "lines": ["vllm serve /models/small --enable-lora \\\n    --max-lora-rank 16"],
    },
    "ledger": {
        "earlier": [
            {
                "reference": "ER-2026-11",
                "record": "11-record",
                "still_forgotten": True,
                "reason": None,
                "measures": {"memorization_accuracy": 0.2},
            }
        ]
    },
    "not_tested": {"control": "no retrained model was given"},
}


def facts(**replaced):
    """Return the facts with some parts replaced; None takes a part away."""
    found = copy.deepcopy(FACTS) | replaced
    return {name: part for name, part in found.items() if part is not None}
