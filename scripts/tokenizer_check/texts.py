"""Texts and conversations for the checks: many scripts, joined emoji, blanks, control characters, texts of tokens."""

from __future__ import annotations

from typing import Any

TEXTS = [
    "The sea is calm tonight.",
    " leading and trailing blanks  ",
    "\n\n  def f(x):\n\treturn x ** 2  # 1234567890\r\n",
    "naïve façade, Ångström, ﬁne, e\u0301 (composed and not)",
    "Съешь же ещё этих мягких французских булок",
    "大江东去，浪淘尽，千古风流人物。𠮷野家で鱻を食う",
    "いろはにほへと ちりぬるを ｶﾀｶﾅ",
    "다람쥐 헌 쳇바퀴에 타고파",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "דג סקרן שט בים מאוכזב",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "ကမ္ဘာမြေ ᚠᛇᚻ᛫ ᏣᎳᎩ 𓀀𓁐 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "👩‍👩‍👧‍👦👍🏽🏳️‍🌈🇪🇺 1️⃣ 🧑🏿‍🚀🦀",
    "a\u00a0b\u2003c\u200bd\u202ee\ufeff \u0000\u0001\u007f",
    "\ufffd and \ufffd\ufffd",
    "▁ ▁▁ <0xE2><0x82> Ġ Ċ â",
    "<s>[INST] hi [/INST]</s><|im_end|><|endoftext|><|user|></think>",
    "",
]
# Written in turns and chunks; parts of a family's flag that only fit together.
LONG = "".join(TEXTS[:14])

SYSTEM = {"role": "system", "content": "You are helpful. <b>&'\"é🙂"}
USER = {"role": "user", "content": "Weather in Zürich?  \n"}
ANSWER = {"role": "assistant", "content": "It is sunny. 🌞"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2], "exact": True}},
        }
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"sky": "sunny"}'}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name, e.g. Zürich"}},
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "answered": [USER, ANSWER],
    "called": [USER, CALL, RESULT],
    "called without a content": [USER, {**CALL, "content": None}, RESULT],
    "called and answered": [SYSTEM, USER, CALL, RESULT, ANSWER, USER],
}
