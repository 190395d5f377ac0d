"""The page itself: its layout, and what happens when something on it is pressed."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb
from calligrapher.errors import CalligrapherError, DataError
from flows.demo.results import problem_html
from flows.demo.session import Studio
from flows.demo.sketch import PAINT, Sketch, easel, kept, on_easel, painted, uploaded_mask

MAX_PICTURES, MAX_STEPS, MAX_SEED = 8, 50, 2**31
STYLES = Path(__file__).with_name("demo.css")
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def _telling(handler: Callable[..., dict]) -> Callable[..., dict]:
    """The handler; where something must hold and does not, that is shown and nothing else
    changes."""

    @functools.wraps(handler)
    def told(page: "Page", *given) -> dict:
        try:
            return {page.problem: ""} | handler(page, *given)
        except CalligrapherError as error:
            return {page.problem: problem_html(error, page.studio.folder)}

    return told


class Page:
    """The parts of the page as attributes. Handlers return {part: what it shows now}.

    `about` says in Markdown what is to be seen.
    """

    def __init__(self, studio: Studio, examples: Sequence[Case], about: str):
        self.studio, self.examples = studio, examples
        with gr.Blocks(
            title="Calligrapher", analytics_enabled=False, fill_width=True
        ) as self.blocks:
            gr.Markdown(f"# Calligrapher\n{about}", elem_id="about")
            self.source = gr.State()
            self.cases = self._gallery(
                "source", "An example: picture, place, style and text", columns=12
            )
            with gr.Row():
                with gr.Column(scale=3):
                    self._lay_out_where()
                    self._lay_out_what()
                with gr.Column(scale=2):
                    self._lay_out_how()
            self.results = gr.HTML(elem_id="results")
            self._wire()

    def launch(self, host: str, port: int) -> None:
        """Serve it from now on, on this machine alone: nobody on the internet is asked or told
        anything."""
        self.blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            theme=gr.themes.Default(primary_hue="pink", neutral_hue="slate", **SYSTEM_FONTS),
            css_paths=[STYLES],
        )

    def _lay_out_where(self) -> None:
        paint = (f"rgb{PAINT[:3]}", PAINT[3] / 255)
        self.canvas = gr.ImageEditor(
            label="1 · Where: paint over the place for the text",
            type="pil",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(
                default_size=40, colors=[paint], default_color=paint, color_mode="fixed"
            ),
            eraser=gr.Eraser(default_size=40),
            buttons=[],
            height=400,
            elem_id="canvas",
        )
        with gr.Row():
            self.source_file = gr.UploadButton("Upload a picture", file_types=["image"], size="sm")
            self.mask_file = gr.UploadButton("Upload a mask", file_types=["image"], size="sm")
            self.clear = gr.Button("Clear the mask", size="sm", elem_id="clear")

    def _lay_out_what(self) -> None:
        with gr.Row(equal_height=True):
            self.text = gr.Textbox(
                label="2 · What: the text to write",
                max_lines=1,
                scale=3,
                elem_id="text",
            )
            self.go = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
        self.problem = gr.HTML(elem_id="problem")

    def _lay_out_how(self) -> None:
        own = self.studio.painter.num_steps
        self.reference = gr.Image(
            label="3 · How: a picture in the style wanted",
            type="filepath",
            sources=["upload", "clipboard"],
            height=180,
            buttons=[],
            elem_id="reference",
        )
        self.styles = self._gallery("reference", "Other styles", columns=6)
        with gr.Row():
            self.seed = gr.Number(
                0, label="First seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90
            )
            self.count = gr.Slider(1, MAX_PICTURES, 2, step=1, label="Pictures", min_width=140)
        with gr.Row():
            self.steps = gr.Slider(
                2, max(MAX_STEPS, own), own, step=1, label="Steps", min_width=140
            )
            self.scale = gr.Slider(0, 2, 1, step=0.05, label="Style scale", min_width=140)

    def _gallery(self, role: str, label: str, columns: int) -> gr.Gallery:
        """Small pictures of the examples to choose from; nothing where there is none."""
        pictures = [on_easel(load_rgb(getattr(case, role))) for case in self.examples[:columns]]
        return gr.Gallery(
            pictures,
            label=label,
            format="png",
            columns=columns,
            height="auto",
            allow_preview=False,
            object_fit="contain",
            buttons=[],
            visible=bool(pictures),
            elem_id=f"{role}-gallery",
        )

    def _wire(self) -> None:
        canvas = [self.canvas, self.problem]
        case = [self.source, self.canvas, self.reference, self.text, self.problem]
        wishes = [self.reference, self.text, self.seed, self.count, self.steps, self.scale]
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        self.source_file.upload(self.take_source, self.source_file, [self.source, *canvas], **quiet)
        self.mask_file.upload(self.take_mask, [self.mask_file, self.source], canvas, **quiet)
        self.clear.click(self.clear_mask, self.source, canvas, **quiet)
        self.cases.select(self.take_example, None, case, **quiet)
        self.styles.select(self.take_style, None, [self.reference, self.problem], **quiet)
        if self.examples:
            self.blocks.load(self.take_first, None, case, **quiet)
        self.go.click(
            self.generate,
            [self.source, self.canvas, *wishes],
            [self.results, self.problem],
            **quiet,
        )

    @_telling
    def take_source(self, file: str) -> dict:
        source = load_rgb(Path(file))
        return {self.source: source, self.canvas: easel(self.studio.folder, source)}

    @_telling
    def take_mask(self, file: str, source: Image.Image | None) -> dict:
        if source is None:
            raise DataError(
                "There must be a source picture before its mask. Upload one, or choose an example."
            )
        return {self.canvas: easel(self.studio.folder, source, uploaded_mask(Path(file), source))}

    @_telling
    def clear_mask(self, source: Image.Image | None) -> dict:
        return {self.canvas: source and easel(self.studio.folder, source)}

    @_telling
    def take_first(self) -> dict:
        return self._taken(self.examples[0])

    @_telling
    def take_example(self, chosen: gr.SelectData) -> dict:
        return self._taken(self.examples[chosen.index])

    def _taken(self, case: Case) -> dict:
        source = load_rgb(case.source)
        return {
            self.source: source,
            self.canvas: easel(self.studio.folder, source, load_mask(case.mask)),
            self.reference: kept(self.studio.folder, load_rgb(case.reference)),
            self.text: case.text,
        }

    @_telling
    def take_style(self, chosen: gr.SelectData) -> dict:
        reference = load_rgb(self.examples[chosen.index].reference)
        return {self.reference: kept(self.studio.folder, reference)}

    def generate(
        self,
        source: Image.Image | None,
        editor: dict | None,
        reference: str | None,
        text: str,
        seed: int | None,
        count: int,
        steps: int,
        scale: float,
    ) -> Iterator[dict]:
        yield {self.problem: ""}
        try:
            if seed is None:
                raise DataError("The first seed must be a whole number, 0 or more.")
            mask = painted(editor["layers"], source.size) if source and editor else None
            sketch = Sketch(source, mask, load_rgb(Path(reference)) if reference else None, text)
            seeds = range(seed, seed + int(count))
            for html in self.studio.results(sketch, seeds, num_steps=int(steps), scale=scale):
                yield {self.results: html}
        except CalligrapherError as error:
            yield {self.problem: problem_html(error, self.studio.folder), self.results: ""}
