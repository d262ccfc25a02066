"""A record of measured cases, which are saved one by one and shown as a table."""

import dataclasses
import json
import pathlib

from tda.reports import formats
from tda.runtime import atomic_file


@dataclasses.dataclass(frozen=True)
class Case:
    """The case that a line of a record is about."""

    part: str
    shape: str = ""
    side: int = 0
    correction: str = ""
    queries: int = 0

    @property
    def title(self) -> str:
        """Its name in the record and in the table."""
        names = [self.part, self.shape, self.correction]
        names += [f"side {self.side}"] * (self.side > 0)
        names += [f"queries {self.queries}"] * (self.queries > 0)
        return ", ".join(filter(None, names))


class Record:
    """The figures of finished cases, each of which is saved at once.

    Args:
        path: a file of JSON lines; its cases are read.
        about: JSON values of the machine and the protocol of the measurements.

    Raises:
        ValueError: the file is about another machine or protocol.
    """

    def __init__(self, path: pathlib.Path, about: dict):
        self._path, self._about = path, about
        self.figures: dict[str, dict] = {}
        """By the title of the case."""
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            entry = json.loads(line)
            if entry["about"] != about:
                raise ValueError(
                    f"{path} is about {entry['about']}, and this is {about}; give another --out"
                )
            self.figures[entry["case"]] = entry["figures"]

    def add(self, case: Case, figures: dict) -> None:
        """Adds a case's figures."""
        self.figures[case.title] = figures
        lines = (
            json.dumps({"case": title, "about": self._about, "figures": x})
            for title, x in self.figures.items()
        )
        with atomic_file.open_atomic(self._path) as out:
            out.writelines(f"{line}\n" for line in lines)

    def markdown(self, cases: list[Case]) -> str:
        """Returns a table of the finished ones among some cases."""
        rows = [self._row(case) for case in cases if case.title in self.figures]
        head = ["case", "rate", "batch", "time over training's", "share of the peak"]
        about = ", ".join(f"{k} {v}" for k, v in self._about.items())
        return f"{formats.markdown(head, rows, 'lrrrr')}\n\n{about}\n"

    def _row(self, case: Case) -> list[str]:
        figures = self.figures[case.title]
        training = self.figures.get(Case("train", case.shape).title, {})
        rates = [
            f"{value:,.0f} {name.removesuffix(' a second')}/s"
            for name, value in figures.items()
            if name.endswith(" a second") and value is not None
        ]
        unit, share, over = "tokens a second", figures.get("share of the peak"), ""
        if case.part in ("encode", "capture") and unit in figures and unit in training:
            over = f"{training[unit] / figures[unit]:.2f}"
        cells = ["; ".join(rates) or figures["failed"], str(figures.get("batch", "")), over]
        return [case.title, *cells, "" if share is None else f"{share:.0%}"]
