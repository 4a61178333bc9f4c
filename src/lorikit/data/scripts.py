"""Dialogue scripts -> what was said: `NAME: line`, with headings, stage directions and lines that go on.

    SCENE 2. The harbour.             heading: what is said before it is no question to what follows
    MIRA (softly): Is he here?        a turn; what stands in brackets is a direction and is cut
      He promised.                    goes on, up to a blank line
    (She turns away.)                 direction: also [...], 【...】, （...） and *...*
    Later that day.                   narration

Names stand before a colon, ASCII or full width, have at most 30 characters and 4 words, and no sentence in them. A name on
a line of its own above its speech, as in film scripts, is not read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from lorikit.data.material import Material, Said

_NAME = re.compile(
    r"\s*(?:\*\*|__)?(?P<name>[【\[]?\w[^:：\n]{0,60}?)(?:\*\*|__)?\s*[:：](?!//)(?:\*\*|__)?\s*(?P<text>.*)", re.DOTALL
)
_NO_NAME = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069,;!?\"“”。，；！？、…]|(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\b[A-Z][a-z]{2})\."
)
_HEADING = re.compile(
    r"\s*(?:#{1,6}\s"
    r"|(?:[-=*_~][ \t]*){3,}$"
    r"|(?i:act|scene|chapter|part|episode)\s+(?:[\divxlc]+|(?i:one|two|three|four|five|six|seven|eight|nine|ten|the\s\w+))\b"
    r"|(?i:prologue|epilogue|curtain|the end|fade (?:in|out))\b[.: ]*$"
    r"|(?:INT|EXT|INT\./EXT)[./ ]"
    r"|第[\d〇零一二三四五六七八九十百千两]+[幕场場章回集节節折话話]"
    r"|(?:序幕|尾声|楔子|幕落|全剧终|剧终)\s*[。：:]?\s*$"
    r"|[-—]{2,}.*[-—]{2,}$)"
)
_ABOUT = {
    *(
        "title",
        "author",
        "by",
        "setting",
        "time",
        "place",
        "cast",
        "characters",
        "scene",
        "location",
        "dramatis personae",
    ),
    *("标题", "剧名", "作者", "编剧", "场景", "时间", "地点", "人物", "登场人物", "布景", "出场人物"),
}
_BRACKETS = {"(": ")", "（": "）", "[": "]", "【": "】"}
_INSIDE = re.compile(
    r"\([^()]{0,400}\)|（[^（）]{0,400}）|\[[^\[\]]{0,400}\]|【[^【】]{0,400}】|(?<![0-9A-Za-z*])\*[^*\n]+\*(?![0-9A-Za-z*])"
)
_LONGEST_DIRECTION = 20  # lines; a bracket that is open for longer was forgotten


def read_script(lines: Sequence[str], name: str) -> Material:
    """What was said in the lines of a script, scene by scene; consecutive lines of one speaker are one turn."""
    material = Material(name, "script", "line")
    scene: list[Said] = []
    speaker = ""
    number = 0
    while number < len(lines):
        number += 1
        line = lines[number - 1]
        if not line.strip():
            material.fates[number], speaker = "blank", ""
        elif _is_heading(line):
            material.fates[number], speaker = "heading", ""
            scene = _next_scene(material, scene)
        elif length := _direction(lines, number - 1):
            material.mark(range(number, number + length), "direction")
            number += length - 1
        elif found := name_and_text(line):
            speaker = found[0]
            _say(material, scene, speaker, found[1], number)
        elif speaker:
            _say(material, scene, speaker, line, number)
        else:
            started = bool(scene or material.scenes)
            material.fates[number] = "narration" if started else "before the first"
    _next_scene(material, scene)
    return material


def name_and_text(line: str) -> tuple[str, str] | None:
    """Who speaks in this line, and what, directions still in it; None where no name stands before a colon."""
    match = _NAME.match(line)
    if not match:
        return None
    name = without_directions(match["name"]) or match["name"].strip("【】[] ")
    name = unicodedata.normalize("NFKC", name).strip("*_ ")
    if not 0 < len(name) <= 30 or len(name.split()) > 4 or _NO_NAME.search(name) or not any(map(str.isalpha, name)):
        return None
    return name, match["text"]


def without_directions(text: str) -> str:
    """`text` without what stands in brackets or between asterisks; brackets inside brackets too."""
    while (shorter := _INSIDE.sub(" ", text)) != text:
        text = shorter
    text = re.sub(r"[ \t]+([,.;:!?…，。；：！？])", r"\1", text)
    # Between signs of Chinese and Japanese no space is written; the one that a direction leaves goes.
    text = re.sub(r"(?<=[\u3000-\u9fff\uff00-\uffef])[ \t]+(?=[\u3000-\u9fff\uff00-\uffef])", "", text)
    lines = (re.sub(r"[ \t]{2,}", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _is_heading(line: str) -> bool:
    if _HEADING.match(line):
        return True
    found = name_and_text(line)
    return found is not None and found[0].casefold() in _ABOUT


def _direction(lines: Sequence[str], start: int) -> int:
    """How many lines from lines[start] on are one direction; 0 where that line is none."""
    text = lines[start].strip()
    if not without_directions(text).strip(".。!！ "):
        return 1
    closing = _BRACKETS.get(text[0])
    if not closing or closing in text:
        return 0
    for length in range(2, _LONGEST_DIRECTION + 1):
        if start + length > len(lines) or not lines[start + length - 1].strip():
            return 0
        if lines[start + length - 1].rstrip().endswith(closing):
            return length
    return 0


def _say(material: Material, scene: list[Said], speaker: str, text: str, number: int) -> None:
    """Add a line to what was said: to the last turn if that is the same person's."""
    if not without_directions(text):
        material.fates[number] = "direction" if text.strip() else "no text"
        return
    material.fates[number] = "other speaker"
    if scene and same_name(scene[-1].speaker) == same_name(speaker):
        before = scene.pop()
        scene.append(Said(before.speaker, f"{before.text}\n{text}", (*before.lines, number)))
    else:
        scene.append(Said(speaker, text, (number,)))


def same_name(name: str) -> str:
    """What two spellings of a name have in common: no case, width or spaces at its ends."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _next_scene(material: Material, scene: Sequence[Said]) -> list[Said]:
    """Put a scene that is complete where it belongs. Only now are directions cut, since one may go over several lines."""
    done: list[Said] = []
    for said in scene:
        text = without_directions(said.text)
        if not text:
            material.mark(said.lines, "direction")
        elif done and same_name(done[-1].speaker) == same_name(said.speaker):
            before = done.pop()
            done.append(Said(before.speaker, f"{before.text}\n{text}", (*before.lines, *said.lines)))
        else:
            done.append(Said(said.speaker, text, said.lines))
    if done:
        material.scenes.append(done)
    return []
