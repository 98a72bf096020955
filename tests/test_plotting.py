import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from modeling_querit.plotting import new_plot, save_plot


def drawn(width=3, height=2):
    figure = new_plot(width, height)
    figure.subplots().plot([0, 1], [0, 1])
    return figure


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(3, 2), (1.5, 4)])
def test_a_figure_has_the_size_in_inches(tmp_path, width, height):
    save_plot(drawn(width, height), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (120 * width, 120 * height)
        # Something was drawn.
        assert len(image.convert("L").getcolors()) > 2


def test_a_plot_is_png_whatever_its_name(tmp_path):
    save_plot(drawn(), str(tmp_path / "deep" / "figure"))
    assert (tmp_path / "deep" / "figure").read_bytes().startswith(b"\x89PNG")


def test_a_plot_is_written_atomically(tmp_path, monkeypatch):
    figure, path = drawn(), tmp_path / "figure.png"
    path.write_text("before")

    def fail(temporary, **kwargs):
        temporary.write_text("half of i")
        raise RuntimeError

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RuntimeError):
        save_plot(figure, path)
    assert path.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_no_display_is_needed_and_no_figure_stays_open(tmp_path, monkeypatch):
    """Whatever backend is set: pyplot, which would ask it for a window and keep the figure, never hears of it."""
    import matplotlib.pyplot

    for name in ("figure", "new_figure_manager", "switch_backend"):
        monkeypatch.setattr(matplotlib.pyplot, name, None)
    figure = new_plot(2, 1)
    figure.subplots()
    save_plot(figure, tmp_path / "figure.png")
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert matplotlib.pyplot.get_fignums() == []


@pytest.mark.parametrize("name", ["m$x_{$", "$\\frac$", "\x1b[2J", "\u77e5"])
def test_names_are_drawn_as_they_are(tmp_path, name, recwarn):
    """Of models, collections and languages, which others choose: matplotlib reads what is between dollars as TeX."""
    figure = new_plot(2, 1)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=name)
    axes.set_title(name)
    axes.set_yticks([0, 1], [name, "other"])
    axes.legend()
    save_plot(figure, tmp_path / "figure.png")
    assert not recwarn
