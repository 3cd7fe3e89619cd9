"""Answers drawn from markdown: as markdown-it (another CommonMark reader) draws them, and never as live markup."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

SAMPLES = """\
# One
===
## Two ##
text of *one* paragraph
over **two** lines
===
***both*** and _under_ but snake_case_name and 2*3*4
===
a **bold *and nested* text** and ~~gone~~
===
- a
- b
  - c
    - d
- e
===
1. one
2. two

   second paragraph of two
3. three
===
7) seven
8) eight
===
- loose

- items
===
* a
+ another list
===
> quoted
> on
lazily

after
===
> - list in a quote
> - with `code`
>
> end
===
```python
def f(x):
    return x * 2  # <b>
```
===
~~~
tildes ``` inside
~~~
===
    indented code
      more

    after a gap
===
| a | b |
|:--|--:|
| 1 | `x \\| y` |
| 2 |
===
no table | here
===
[a link](https://example.org/a_b) and [titled](https://example.org "t")
===
<https://example.org/x> and <mail@example.org>
===
hard \x20
break and \\
another
===
`` code with ` inside `` and `a  b`
===
\\*not emphasis\\* and \\# no heading
===
AT&amp;T &lt;b&gt; &#233; &#x4e2d;
===
Setext
------

Title
=====
===
***
===
a * b * c and * d
===
**中文**和*强调*
===
- [link](https://example.org)
  ```sh
  echo hi
  ```
- after
===
1. a
   - b

     c
2. d
===
text
- list after text
===
text
2. no list, for it begins with two
===
*a **b* c**
===
**a*b*c**
===
_a __b__ c_
===
[not](closed and `code](https://x.org)`
===
para

> quote

para
===
- a

  > quoted in a list

      code in it
- b
"""
PARTS = [
    "*", "**", "_", "`", "``", "~~", "a", "b c", " ", "\n", "\n\n", "- ", "1. ", "> ", "# ", "\\", "[", "](https://x.org)",
    "word", "    ", "  ", "x.", "!", "(", ")", "&amp;", "---\n", "```\n", "| a | b |\n|---|---|\n| c | d |\n",
]  # fmt: skip
HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<a href=\"javascript:document.title='owned'\">click</a>",
    "<iframe src=https://example.org></iframe><svg onload=document.title='owned'>",
    "[click](javascript:document.title='owned')",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java\tscript:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](vbscript:x) [file](file:///etc/passwd) [here](/v1/models) [up](//example.org)",
    "[a](https://ok.example/\"onmouseover=\"document.title='owned')",
    "![image](https://example.org/track.png) ![x](javascript:alert(1))",
    "![a](x\" onerror=\"document.title='owned')",
    "<javascript:alert(1)> <data:text/html,x>",
    "```<img src=x onerror=alert(1)>\n</code></pre><script>document.title='owned'</script>\n```",
    "| <b>a</b> | [x](javascript:1) |\n|---|---|\n| <img src=x onerror=alert(1)> | `</td>` |",
    "# <h1 onclick=\"document.title='owned'\">",
    "> <style>body{display:none}</style>",
    '- <form action=https://example.org><input name=q autofocus onfocus="document.title=1">',
    "&lt;script&gt;document.title='owned'&lt;/script&gt;",
    "[a](<javascript:alert(1)>) [b]( javascript:alert(1) ) [c](\x01javascript:alert(1))",
    'https://example.org/"onclick="alert(1) and http://x\'><script>',
    "<!-- --><details open ontoggle=alert(1)>",
    "[x](mailto:a@b.c?subject=<script>)",
    "\u202egnirts desrever\u202c [bidi](https://example.org/\u202ecod.exe)",
]
ALLOWED = {
    "a", "blockquote", "br", "button", "code", "del", "div", "em", "figcaption", "figure", "h3", "h4", "h5", "h6", "hr",
    "input", "li", "ol", "p", "path", "pre", "span", "strong", "svg", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
DEEP = {
    "quotes": ">" * 20_000 + " x",
    "lists": "".join(" " * (2 * i) + "- a\n" for i in range(400)),
    "brackets": "[" * 20_000 + "](https://x.org)" * 2000,
    "stars": "*a **b " * 5000,
    "underscores": "_" * 30_000 + "a" + "_" * 30_000,
    "ticks": "".join("`" * (i % 200 + 1) + " " for i in range(4000)),
    "links": "[a](" * 10_000,
    "spaces": "# x" + " " * 40_000 + "y",
    "hashes": "# " + "#" * 40_000 + "x",
    "pipes": "|" * 10_000 + "\n" + "|-" * 10_000 + "|",
    "formulas": "\\[\n" * 10_000,
    "line breaks": "a \n" * 20_000,
    "urls": "https://x.org/" + "(" * 20_000 + ")" * 20_000,
    "escapes": "\\" * 40_000,
}


class Outline(HTMLParser):
    """Tags and words of a document, without what two readers may do differently: wrappers, white space, attributes."""

    SKIPPED = frozenset({"div", "span", "figure", "svg", "path", "button", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.out: list[str] = []
        self.silent = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag == "figcaption":
            self.silent += 1
        name = (
            re.sub(r".*level-(\d).*", r"h\1", given.get("class") or "")
            if tag[0] == "h" and tag != "hr"
            else tag
        )
        self.open.append(name or tag)
        if tag == "s":
            name = self.open[-1] = "del"
        if tag not in self.SKIPPED and not self.silent:
            start = given.get("start", "1") if tag == "ol" else ""
            self.out.append(f"<{name or tag}{given.get('href', '')}{'' if start in ('', '1') else start}>")
        if tag in ("br", "hr", "input"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in ("br", "hr", "input"):
            return
        name = self.open.pop()
        if tag == "figcaption":
            self.silent -= 1
        elif tag not in self.SKIPPED and not self.silent:
            self.out.append(f"</{name}>")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.out.append(data)


def outline(html: str) -> str:
    parser = Outline()
    parser.feed(html)
    parser.close()
    text = "".join(parser.out)
    text = re.sub(r"\s+</code></pre>", "</code></pre>", text)
    text = re.sub(r"(?<=\w)/(?=>|</a>)", "", text)  # https://example.org and https://example.org/
    text = re.sub(r"<a([^<>]*)>(?:\1)?</a>", r"\1", text)  # the reference makes no links of bare addresses
    return re.sub(r"\s*(</?(?:p|li|ul|ol|blockquote|pre|h\d|hr|br|table|thead|tbody|tr|t[hd])\d*>)\s*", r"\1",
                  re.sub(r"\s+", " ", text)).strip()  # fmt: skip


def drawn(window: Any, server: Any, texts: list[str]) -> list[str]:
    """What the page makes of answers with these texts: the HTML of each."""
    messages, order, parent = {}, [], None
    for i, text in enumerate(texts):
        for role in ("user", "assistant"):
            name = f"{role}-{i}"
            messages[name] = {
                "id": name,
                "parent": parent,
                "role": role,
                "text": text if role == "assistant" else "q",
            }
            order.append(name)
            parent = name
    kept = {"id": "c1", "title": "t", "updated": 1, "messages": messages, "order": order, "chosen": {}}
    page = window.page
    page.goto(server.url)
    page.evaluate("c => localStorage.setItem('deepseek.chat.c.c1', c)", json.dumps(kept))
    page.goto("about:blank")
    page.goto(server.url)
    page.wait_for_selector("#composer")
    page.click(".chat-open")
    while page.locator(".earlier").count():
        page.click(".earlier")
        page.wait_for_timeout(30)
    found = page.evaluate("[...document.querySelectorAll('article.assistant .prose')].map(e => e.innerHTML)")
    assert len(found) == len(texts)
    return found


def reference(text: str) -> str:
    markdown_it = pytest.importorskip(
        "markdown_it", reason="markdown-it-py, which pytest's plug-ins bring, is absent"
    )
    reader = markdown_it.MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    reader.disable(["reference", "html_block", "html_inline"])
    return reader.render(text)


def test_common_markdown_is_drawn_as_another_reader_draws_it(server: Any, window: Any) -> None:
    samples = SAMPLES.split("\n===\n")
    found = drawn(window, server, samples)
    wrong = {
        text: (outline(html), outline(reference(text)))
        for text, html in zip(samples, found, strict=True)
        if outline(html) != outline(reference(text))
    }
    assert wrong == {}
    assert window.troubles == []


def test_random_markdown_is_drawn_as_another_reader_draws_it(server: Any, window: Any) -> None:
    random_ = random.Random(1)
    samples = [
        "".join(random_.choices(PARTS, k=random_.randrange(3, 14))).strip("\n") + "." for _ in range(400)
    ]
    found = drawn(window, server, samples)
    same = sum(outline(html) == outline(reference(text)) for text, html in zip(samples, found, strict=True))
    assert same >= 0.95 * len(samples), f"{same} of {len(samples)} are the same"


def test_hostile_markdown_stays_text(server: Any, window: Any) -> None:
    found = drawn(window, server, HOSTILE)
    page = window.page
    assert page.title() != "owned"
    tags = page.evaluate("[...new Set([...document.querySelectorAll('.prose *')].map(e => e.localName))]")
    assert set(tags) <= ALLOWED, set(tags) - ALLOWED
    bad = page.evaluate("""[...document.querySelectorAll('.prose *')].flatMap(e => [...e.attributes]
        .filter(a => a.name.startsWith('on') || ['src', 'srcdoc', 'action', 'formaction', 'style'].includes(a.name)
                     || (a.name === 'href' && !/^(https?:|mailto:)/.test(a.value)))
        .map(a => e.outerHTML.slice(0, 200)))""")
    assert bad == []
    links = page.evaluate("[...document.querySelectorAll('.prose a')].map(e => [e.rel, e.target])")
    assert links
    assert all("noopener" in rel and "noreferrer" in rel and target == "_blank" for rel, target in links)
    shown = page.evaluate(
        "[...document.querySelectorAll('article.assistant .prose')].map(e => e.textContent)"
    )
    assert "<script>document.title='owned'</script>" in shown[0], "the reader sees the characters"
    assert "<img" not in found[11], "an image is a link: to load it would tell its server who reads"
    assert window.foreign == []
    assert window.troubles == []


def test_hostile_depth_does_not_hold_the_page(server: Any, window: Any) -> None:
    """20,000 brackets, quotes, stars …: more than linear work would outlast the browser's patience of 30 seconds."""
    drawn(window, server, list(DEEP.values()))
    assert window.troubles == []
