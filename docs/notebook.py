"""The story as a notebook: `python docs/notebook.py > story.ipynb`. Its cells have the code without its results."""

import doctest
import re
from pathlib import Path

import jupytext

STORY = Path(__file__).parent / "story.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALL = "```python\n%pip install vmapbn-flax\n```\n\n"
SHOW = '\n\n```python\nfrom IPython.display import Image\n\nImage("runs/story/figure.png")\n```\n'


def without_prompts(block: re.Match) -> str:
    """A block of Markdown whose code has lost its prompts and results."""
    source = "".join(example.source for example in doctest.DocTestParser().get_examples(block[1]))
    return f"```python\n{source}```"


def main() -> None:
    text = INSTALL + BLOCK.sub(without_prompts, STORY.read_text()) + SHOW
    print(jupytext.writes(jupytext.reads(text, fmt="md"), fmt="ipynb"))


if __name__ == "__main__":
    main()
