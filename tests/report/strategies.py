"""Reports of any content, for hypothesis."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tunesmith.core.report import Figure, Listing, Plot, Report, Sample, Table

# A whole report shrinks for minutes; as drawn it says enough.
LARGE = settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
RESERVED = ("NaN", "Infinity", "-Infinity")
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda s: s not in RESERVED)
numbers = st.floats() | st.integers(-(10**400), 10**400) | st.integers(-100, 100)
values = st.none() | st.booleans() | numbers | words
units = st.sampled_from(["", "share", "bytes", "seconds", "count", "tokens/s"]) | words
figures = st.builds(
    Figure,
    value=values,
    before=values,
    unit=units,
    better=st.sampled_from(["higher", "lower", None]),
    of=st.none() | st.integers() | st.floats(),
    help=words,
    group=words,
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    columns = draw(st.lists(words, min_size=1, max_size=5))
    rows = draw(st.lists(st.tuples(*[values | figures for _ in columns]), max_size=4))
    given = draw(st.none() | st.tuples(*[units for _ in columns]))
    return Table(draw(words), columns, rows, draw(words), given or (), draw(st.booleans()))


@st.composite
def series(draw: st.DrawFn, xs: st.SearchStrategy) -> dict:
    pairs = st.lists(st.tuples(xs, st.floats()), max_size=6)
    labels = draw(st.lists(words, max_size=3, unique=True))
    drawn = {label: draw(pairs) for label in labels}
    return {label: ([x for x, _ in pair], [y for _, y in pair]) for label, pair in drawn.items()}


@st.composite
def plots(draw: st.DrawFn, below: bool = True) -> Plot:
    plot = Plot(draw(words), draw(st.sampled_from(["line", "bar", "heatmap"] if below else ["line"])), draw(words))
    plot.y, plot.unit, plot.note = draw(words), draw(units), draw(words)
    if plot.kind == "heatmap":
        wide = draw(st.integers(1, 4))
        plot.matrix = draw(st.lists(st.lists(st.floats(), min_size=wide, max_size=wide), max_size=4))
        if plot.matrix and draw(st.booleans()):
            plot.row_labels = draw(st.lists(words, min_size=len(plot.matrix), max_size=len(plot.matrix)))
            plot.column_labels = draw(st.lists(words, min_size=wide, max_size=wide))
        return plot
    if plot.kind == "line" and below:
        plot.below = draw(st.none() | plots(below=False))
    xs = st.floats() | st.integers(-100, 100)
    # Two plots over one axis have numbers there.
    plot.series = draw(series(xs | words if below and plot.below is None else xs))
    plot.styles = {label: draw(st.sampled_from(["line", "smooth", "points"])) for label in plot.series}
    return plot


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    outputs = draw(st.dictionaries(words, words, max_size=3))
    return Sample(draw(words), draw(words), outputs, {k: draw(st.booleans()) for k in outputs}, draw(words))


reports = st.builds(
    Report,
    title=words,
    figures=st.dictionaries(words, figures | values, max_size=4),
    tables=st.lists(tables(), max_size=2),
    plots=st.lists(plots(), max_size=2),
    samples=st.lists(samples(), max_size=2),
    notes=st.lists(words, max_size=2),
    details=st.dictionaries(words, st.lists(words | st.booleans() | st.none()) | words, max_size=2),
    summary=words,
    warnings=st.lists(words, max_size=2),
    listings=st.lists(st.builds(Listing, words, words), max_size=2),
)
