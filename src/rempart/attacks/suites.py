"""Suites: which attacks an audit runs, as data."""

from typing import Any

Suite = tuple[tuple[str, dict[str, Any]], ...]

SUITES: dict[str, Suite] = {
    "quick": (
        ("fgsm", {}),
        ("bim", {"steps": 10}),
        ("mim", {"steps": 10}),
        ("pgd", {"steps": 40}),
        ("pgd", {"steps": 40, "loss": "margin"}),
        ("deepfool", {}),
    ),
    "classic": (
        ("fgsm", {}),
        ("bim", {"steps": 10}),
        ("mim", {"steps": 10}),
        ("pgd", {"steps": 40, "restarts": 2}),
        ("pgd", {"steps": 40, "loss": "margin", "restarts": 2}),
        ("deepfool", {}),
        ("cw", {"steps": 100, "search_steps": 5, "initial_const": 0.1, "learning_rate": 0.1}),
        ("ead", {"steps": 100, "search_steps": 5, "initial_const": 0.1}),
    ),
}
