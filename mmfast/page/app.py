"""The page itself: which parts it has and what each event does. Texts of people and models are shown as they are."""

from __future__ import annotations

import html
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from mmfast.page.chat import Answer, Conversation, ModelSlot, Question, explain
from mmfast.page.examples import COUNT, world_questions
from mmfast.page.runs import Run

__all__ = ["CSS", "JS", "THEME", "Page"]

# Fonts of the system: gradio's themes ask for files, some of them from other hosts.
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
    font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
)
CSS = """
.gradio-container { width: 100% !important; max-width: 960px !important; margin: 0 auto !important; }
#page { gap: .6rem; }
#title h1 { font-size: 1.4rem; font-weight: 650; margin: 0; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#new { max-width: 8rem; font-size: .95rem; font-weight: 500; }
#status { min-height: 1.5rem; padding: 0 !important; }
#status p { margin: 0; color: var(--body-text-color-subdued); font-size: .875rem; }
#error, #title { padding: 0 !important; }
#error p, #refused { margin: 0; padding: .6rem .8rem; border: 1px solid #dc2626; border-left-width: 4px;
  border-radius: 6px; background: #dc26261a; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
#refusal:has(#refused:empty), .toast-wrap { display: none !important; }
#chat img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated; }
#chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
.dark { color-scheme: dark; }
#chat [aria-label="Share"] { display: none; }
.example { justify-content: flex-start !important; flex-wrap: nowrap !important; font-weight: 400 !important;
  text-align: left; }
.example img { flex: none; image-rendering: pixelated; width: 2rem; height: 2rem; border-radius: 3px; }
"""
# What gradio refuses itself, such as a file that is too large, it says in notes that fade: they move into our box.
JS = """
() => {
  const move = () => {
    const box = document.getElementById('refused');
    for (const toast of box ? document.querySelectorAll('.toast-body.error:not([data-moved])') : []) {
      toast.dataset.moved = 'yes';
      box.textContent = toast.querySelector('[data-testid=toast-text]').textContent.trim();
      toast.querySelector('[data-testid=toast-close]').click();
    }
  };
  new MutationObserver(move).observe(document.body, { childList: true, subtree: true });
}
"""
_CLEAR = (
    "(...values) => { const box = document.getElementById('refused'); if (box) box.textContent = ''; return values; }"
)
_PAUSE = 0.1  # seconds between two views of an answer that grows
_TITLE = "<h1>mmfast</h1><p>Ask a trained model about images or videos. Everything stays on this machine.</p>"


class Page:
    """All conversations and what their pages show.

    Args:
        list_runs: Gives the runs to choose from.
        slot: Holds the model.
        folder: For files that the page makes.
        temperature: Where its slider starts; 0 answers greedily.
        max_new_tokens: Where its slider starts: longest answer, in tokens.
    """

    def __init__(
        self,
        list_runs: Callable[[], list[Run]],
        slot: ModelSlot,
        folder: Path,
        temperature: float = 0.0,
        max_new_tokens: int = 512,
    ) -> None:
        self._list_runs = list_runs
        self._slot = slot
        self._folder = folder
        self._defaults = (temperature, max_new_tokens)
        self._runs: dict[str, Run] = {}
        self._conversations: dict[str, Conversation] = {}

    def build(self) -> gr.Blocks:
        """The page, to be launched with THEME, CSS and JS."""
        temperature, max_new_tokens = self._defaults
        # Uploads are looked through every hour; what is a day old goes. The rest goes with the folder.
        with gr.Blocks(title="mmfast", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            state = gr.State(None, delete_callback=self.forget)
            with gr.Column(elem_id="page"):
                gr.HTML(_TITLE, elem_id="title")
                with gr.Row(equal_height=True):
                    run = gr.Dropdown([], label="Run", elem_id="run", scale=5, min_width=240)
                    new = gr.Button("New chat", elem_id="new", scale=1, min_width=110)
                self._status = gr.HTML(elem_id="status")
                self._chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    height="max(240px, calc(100dvh - 29rem))",
                    render_markdown=False,
                    latex_delimiters=[],
                    allow_tags=False,
                    buttons=[],
                    allow_file_downloads=False,
                    placeholder="Ask about an image or a video.",
                )
                self._error = gr.HTML(elem_id="error", visible=False)
                gr.HTML('<div id="refused" role="alert"></div>', elem_id="refusal", padding=False)
                with gr.Row():
                    self._examples = [gr.Button(visible=False, elem_classes="example", size="md") for _ in range(COUNT)]
                self._box = gr.MultimodalTextbox(
                    elem_id="question",
                    show_label=False,
                    placeholder="Ask something; add images or a video with the clip.",
                    file_count="multiple",
                    max_plain_text_length=1_000_000,
                    autofocus=True,
                )
                self._stop = gr.Button("Stop", elem_id="stop", variant="stop", visible=False)
                with gr.Accordion("Settings", open=False):
                    warmth = gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0 answers greedily")
                    longest = gr.Slider(
                        1, max(2048, max_new_tokens), max_new_tokens, step=1, label="Longest answer", info="in tokens"
                    )
            shown = [self._chat, self._box, self._status, self._error, self._stop, *self._examples]
            # One model, so one at a time loads or answers; the others wait in order.
            alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
            at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
            opened = blocks.load(self.begin, None, [state, run], **at_once)
            opened.then(self.choose, [state, run], shown, **alone)
            run.input(self.choose, [state, run], shown, js=_CLEAR, **alone)
            sent = self._box.submit(self.send, [state, self._box], shown, js=_CLEAR, **at_once)
            sent.then(self.answer, [state, warmth, longest], shown, **alone)
            self._stop.click(self.stop, state, None, **at_once)
            for event in (new.click, self._chat.clear):
                event(self.reset, state, shown, js=_CLEAR, **at_once)
            for index, button in enumerate(self._examples):
                button.click(lambda key, index=index: self.example(key, index), state, self._box, **at_once)
        return blocks

    def begin(self) -> tuple[str, Any]:
        """A conversation for a page that was opened, and the runs there are now."""
        self._runs = {str(run.folder): run for run in self._list_runs()}
        key = uuid.uuid4().hex
        self._conversations[key] = Conversation()
        choices = [(run.label, name) for name, run in self._runs.items()]
        return key, gr.Dropdown(choices=choices, value=next(iter(self._runs), None))

    def forget(self, key: str | None) -> None:
        """Ends the conversation of a page that was closed."""
        conversation = self._conversations.pop(key or "", None)
        if conversation is not None:
            conversation.stop()

    def choose(self, key: str, name: str | None) -> Iterator[Any]:
        """Loads a run and begins a conversation with it."""
        conversation = self._of(key)
        run = self._runs.get(name or "")
        if run is None:
            yield self._view(conversation, error="demo: there is no such run any more; open the page again")
            return
        conversation.choose(run)
        yield self._view(conversation, f"Loading {run.name} …", waits=True)
        try:
            conversation.about = self._slot.load(run)
        except Exception as error:
            yield self._view(conversation, "Nothing is loaded.", explain(error))
            return
        yield self._view(conversation)

    def send(self, key: str, value: dict[str, Any]) -> Any:
        """Shows a question at once; `answer` then answers it."""
        conversation = self._of(key)
        question = Question(value["text"], tuple(value["files"]))
        try:
            conversation.ask(question)
        except ValueError as error:
            return self._view(conversation, error=str(error), draft=question)
        run: Any = conversation.run
        if self._slot.is_busy:
            status = "Busy: the model answers someone else; this question is next in line …"
        elif not self._slot.has(run):
            status = f"Loading {run.name} …"
        else:
            status = "Answering …"
        return self._view(conversation, status, waits=True)

    def answer(self, key: str, temperature: float, max_new_tokens: int) -> Iterator[Any]:
        """Streams the answer to the question that waits, if there is one."""
        conversation = self._of(key)
        question = conversation.pending
        if question is None:
            yield tuple(gr.skip() for _ in range(5 + COUNT))
            return
        answer, shown_at = Answer(""), 0.0
        try:
            for answer in conversation.answer(self._slot, temperature, max_new_tokens):
                # Each view holds the whole conversation: a few a second are enough.
                if not answer.is_over and time.monotonic() > shown_at + _PAUSE:
                    shown_at = time.monotonic()
                    yield self._view(conversation, "Answering …", waits=True, partial=answer.text)
        except Exception as error:
            yield self._view(conversation, error=explain(error, question.files), draft=question)
            return
        if answer.forgotten is None:
            yield self._view(conversation)
        else:
            yield self._view(conversation, f"{answer.forgotten[0].upper()}{answer.forgotten[1:]}.", draft=question)

    def stop(self, key: str) -> None:
        """Stops the answer."""
        self._of(key).stop()

    def reset(self, key: str) -> Any:
        """Begins a new conversation with the same run."""
        conversation = self._of(key)
        conversation.reset()
        return self._view(conversation)

    def example(self, key: str, index: int) -> Any:
        """Puts an example into the box, to be sent or changed."""
        question = self._questions(self._of(key))[index]
        return {"text": question.text, "files": list(question.files)}

    def _of(self, key: str | None) -> Conversation:
        if key not in self._conversations:
            raise gr.Error("page: this conversation has ended, for the page was closed; open it again")
        return self._conversations[key]

    def _view(
        self,
        conversation: Conversation,
        status: str = "",
        error: str = "",
        draft: Question | None = None,
        waits: bool = False,
        partial: str = "",
    ) -> tuple[Any, ...]:
        """What everything on the page shows; `draft` goes back into the box."""
        messages = []
        turns = [message["content"] for message in conversation.messages[1::2]]
        for question, text in zip(conversation.questions, turns, strict=True):
            messages += [_message("user", question.text, question.files), _message("assistant", str(text))]
        if waits and conversation.pending is not None:
            messages.append(_message("user", conversation.pending.text, conversation.pending.files))
            if partial:
                messages.append(_message("assistant", partial))
        draft = draft or Question()
        questions = () if waits or messages else self._questions(conversation)
        return (
            messages,
            gr.MultimodalTextbox({"text": draft.text, "files": list(draft.files)}, interactive=not waits),
            _line(status or conversation.about, "status"),
            gr.HTML(_line(error, "alert"), visible=bool(error)),
            gr.Button(visible=waits and conversation.pending is not None),
            *(
                gr.Button(questions[i].text, icon=questions[i].files[0], visible=True)
                if i < len(questions)
                else gr.Button(visible=False)
                for i in range(COUNT)
            ),
        )

    def _questions(self, conversation: Conversation) -> Sequence[Question]:
        run = conversation.run
        if run is None or not run.is_world:
            return ()
        kind = "video" if run.description["system"] == "video_chatgpt" else "image"
        try:
            return world_questions(kind, self._folder)
        except ImportError:  # the examples are an offer; the digits come with the extra `world`
            return ()


def _message(role: str, text: str, files: Sequence[str] = ()) -> dict[str, Any]:
    # Without Markdown, gradio still takes a text for HTML.
    return {"role": role, "content": [*({"path": file} for file in files), *([html.escape(text)] if text else [])]}


def _line(text: str, role: str) -> str:
    return f'<p role="{role}">{html.escape(text)}</p>' if text else ""
