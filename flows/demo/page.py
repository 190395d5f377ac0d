"""The page itself: its layout, and what happens when something on it is pressed."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event

import gradio as gr
from starlette.middleware import Middleware

from calligrapher.data.blank import blank_picture, color_of, place_mask, place_of
from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb
from calligrapher.errors import CalligrapherError, DataError
from flows.demo.hosts import KnownHosts, names_of
from flows.demo.results import problem_html
from flows.demo.session import DemoSession
from flows.demo.sketch import (
    PAINT,
    DemoInput,
    Taken,
    editor_value,
    mask_on,
    scaled_for_editor,
    uploaded_mask,
    write_once,
)

MAX_PICTURES, MAX_STEPS, MAX_SEED = 8, 50, 2**31
STYLES = Path(__file__).with_name("demo.css")
# In a browser: when painting begins, the results move into view.
SHOW_RESULTS = """() => {
  const results = document.querySelector('#results');
  if (results.querySelector('figure') && !results.querySelector('figure:not(.waiting)'))
    results.scrollIntoView({behavior: 'smooth', block: innerWidth > 640 ? 'nearest' : 'start'});
}"""
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def _telling(handler: Callable[..., dict]) -> Callable[..., dict]:
    """Return the handler, which shows what must hold where it does not, and changes nothing."""

    @functools.wraps(handler)
    def told(page: "Page", *given) -> dict:
        try:
            return {page.problem: ""} | handler(page, *given)
        except CalligrapherError as error:
            return {page.problem: problem_html(error, page.session.folder)}

    return told


class Page:
    """The parts of the page as attributes. Handlers return {part: what it shows now}.

    `about` says in Markdown what is to be seen.
    """

    def __init__(self, session: DemoSession, examples: Sequence[Case], about: str):
        self.session, self.examples = session, examples
        self._stops: dict[str | None, Event] = {}  # of each browser tab, for what it asked last
        with gr.Blocks(
            title="Calligrapher", analytics_enabled=False, fill_width=True
        ) as self.blocks:
            gr.Markdown(f"# Calligrapher\n{about}", elem_id="about")
            self.taken = gr.State()
            self.cases = self._gallery("source", "An example: picture, place, style and text", 12)
            with gr.Row():
                with gr.Column(scale=3):
                    self._lay_out_where()
                with gr.Column(scale=2):
                    self._lay_out_how()
            self._lay_out_what()
            self.results = gr.HTML(elem_id="results")
            self.download = gr.DownloadButton(
                "Download all pictures", size="sm", visible=False, elem_id="download"
            )
            self._wire()

    def launch(self, host: str, port: int) -> None:
        """Serve the page from now on; nobody on the internet is asked or told anything."""
        known_hosts = Middleware(KnownHosts, names=names_of(host))
        self.blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            app_kwargs={"middleware": [known_hosts]},
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
        with gr.Row(elem_classes="thin-buttons"):
            self.source_file = gr.UploadButton("Upload a picture", file_types=["image"], size="sm")
            self.mask_file = gr.UploadButton("Upload a mask", file_types=["image"], size="sm")
            self.blank = gr.Button("Empty picture", size="sm", elem_id="blank")
            self.color = gr.ColorPicker(
                "#ffffff", show_label=False, container=False, min_width=60, elem_id="color"
            )
            self.clear = gr.Button("Clear the mask", size="sm", elem_id="clear")

    def _lay_out_what(self) -> None:
        with gr.Row(equal_height=True):
            self.text = gr.Textbox(
                label="3 · What: the text to write; Enter generates",
                max_lines=1,
                scale=6,
                min_width=300,
                elem_id="text",
            )
            self.go = gr.Button(
                "Generate", variant="primary", size="lg", min_width=120, elem_id="generate"
            )
            self.stop = gr.Button(
                "Stop", size="lg", min_width=80, interactive=False, elem_id="stop"
            )
        self.problem = gr.HTML(elem_id="problem")

    def _lay_out_how(self) -> None:
        own = self.session.painter.num_steps
        self.reference = gr.Image(
            label="2 · How: a picture in the style wanted",
            type="filepath",
            sources=["upload", "clipboard"],
            height=180,
            buttons=[],
            elem_id="reference",
        )
        self.styles = self._gallery("reference", "Other styles", 6)
        with gr.Row():
            self.seed = gr.Number(
                0, label="First seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90
            )
            self.count = gr.Slider(1, MAX_PICTURES, 2, step=1, label="Pictures", min_width=140)
        with gr.Row():
            self.steps = gr.Slider(
                2,
                max(MAX_STEPS, own),
                own,
                step=1,
                label="Steps",
                min_width=140,
                elem_id="steps",
            )
            self.scale = gr.Slider(0, 2, 1, step=0.05, label="Style scale", min_width=140)

    def _gallery(self, role: str, label: str, count: int) -> gr.Gallery:
        """Lay out small pictures of the first examples to choose from; none without examples."""
        pictures = [
            scaled_for_editor(load_rgb(getattr(case, role))) for case in self.examples[:count]
        ]
        return gr.Gallery(
            pictures,
            label=label,
            format="png",
            columns=count,
            height="auto",
            allow_preview=False,
            object_fit="contain",
            buttons=[],
            visible=bool(pictures),
            elem_id=f"{role}-gallery",
        )

    def _wire(self) -> None:
        canvas = [self.taken, self.canvas, self.problem]
        outcome = [self.results, self.download, self.go, self.stop]
        case = [*canvas, self.reference, self.text, *outcome]
        settings = [self.reference, self.text, self.seed, self.count, self.steps, self.scale]
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        generating = gr.on(
            [self.go.click, self.text.submit],
            self.generate,
            [self.taken, self.canvas, *settings],
            [self.problem, *outcome],
            **quiet,
        )
        self.results.change(None, None, None, js=SHOW_RESULTS, **quiet)
        self.stop.click(self.stop_generating, None, self.stop, **quiet)
        # What is still painted belongs to another picture from now on.
        anew = quiet | {"cancels": [generating]}
        self.source_file.upload(self.take_source, self.source_file, [*canvas, *outcome], **anew)
        self.blank.click(self.take_blank, self.color, [*canvas, *outcome], **anew)
        self.cases.select(self.take_example, None, case, **anew)
        self.mask_file.upload(self.take_mask, [self.mask_file, self.taken], canvas, **quiet)
        self.clear.click(self.clear_mask, self.taken, canvas, **quiet)
        self.styles.select(self.take_style, None, [self.reference, self.problem], **quiet)
        if self.examples:
            self.blocks.load(self.take_first, None, case, **quiet)

    @_telling
    def take_source(self, file: str, request: gr.Request) -> dict:
        source = load_rgb(Path(file))
        self._stop(request)
        return self._shows(Taken(source)) | self._outcome("")

    @_telling
    def take_blank(self, color: str, request: gr.Request) -> dict:
        """Take an empty picture as large as the canvas, painted over but for a margin."""
        size = (self.session.painter.canvas.width, self.session.painter.canvas.height)
        source = blank_picture(size, color_of(color))
        self._stop(request)
        mask = place_mask(size, place_of(None, size))
        return self._shows(Taken(source, mask)) | self._outcome("")

    @_telling
    def take_mask(self, file: str, taken: Taken | None) -> dict:
        if taken is None:
            raise DataError(
                "There must be a source picture before its mask. Upload one, or choose an example."
            )
        return self._shows(Taken(taken.source, uploaded_mask(Path(file), taken.source)))

    @_telling
    def clear_mask(self, taken: Taken | None) -> dict:
        return {self.canvas: None} if taken is None else self._shows(Taken(taken.source))

    @_telling
    def take_first(self) -> dict:
        return self._taken(self.examples[0])

    @_telling
    def take_example(self, chosen: gr.SelectData, request: gr.Request) -> dict:
        self._stop(request)
        return self._taken(self.examples[chosen.index])

    def _taken(self, case: Case) -> dict:
        return {
            **self._shows(Taken(load_rgb(case.source), load_mask(case.mask))),
            self.reference: write_once(self.session.folder, load_rgb(case.reference)),
            self.text: case.text,
            **self._outcome(""),
        }

    def _shows(self, taken: Taken) -> dict:
        """Return what keeps a picture and has the editor draw it."""
        drawn = editor_value(self.session.folder, taken.source, taken.mask)
        return {self.taken: taken, self.canvas: drawn}

    @_telling
    def take_style(self, chosen: gr.SelectData) -> dict:
        reference = load_rgb(self.examples[chosen.index].reference)
        return {self.reference: write_once(self.session.folder, reference)}

    def generate(
        self,
        taken: Taken | None,
        editor: dict | None,
        reference: str | None,
        text: str,
        seed: int | None,
        count: int,
        steps: int,
        scale: float,
        request: gr.Request,
    ) -> Iterator[dict]:
        """Yield what the page shows while every variant paints."""
        stop = self._stops[request.session_hash] = Event()
        yield {self.problem: "", **self._outcome("", busy=True)}
        try:
            if seed is None:
                raise DataError("The first seed must be a whole number, 0 or more.")
            source, mask = (taken.source, mask_on(taken, editor)) if taken else (None, None)
            given = DemoInput(source, mask, load_rgb(Path(reference)) if reference else None, text)
            seeds = range(seed, seed + int(count))
            for shown in self.session.results(
                given, seeds, num_steps=int(steps), scale=scale, stop=stop
            ):
                yield self._outcome(shown.html, busy=True, archive=shown.archive)
            yield self._outcome(shown.html, archive=shown.archive)
        except CalligrapherError as error:
            yield {self.problem: problem_html(error, self.session.folder), **self._outcome("")}

    def stop_generating(self, request: gr.Request) -> dict:
        """Let what this browser waits for end at its next step; what is painted stays."""
        self._stop(request)
        return {self.stop: gr.Button(interactive=False)}

    def _stop(self, request: gr.Request) -> None:
        if stop := self._stops.get(request.session_hash):
            stop.set()

    def _outcome(self, html: str, *, busy: bool = False, archive: Path | None = None) -> dict:
        """Return what shows results, offers them as a file, and starts and stops painting."""
        return {
            self.results: html,
            self.download: gr.DownloadButton(value=archive, visible=archive is not None),
            self.go: gr.Button(interactive=not busy),
            self.stop: gr.Button(interactive=busy),
        }
