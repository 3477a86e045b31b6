"""A row of each published format of preference data, and what it says.

The columns are those of the data sets on the hub. A text as the prompt is to be continued as it is; a list is a chat.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    row: dict[str, Any]
    format: str
    prompt: Any
    """A text, or the contents of a chat's messages."""
    chosen: str
    rejected: str
    objective: str | None = None


def said(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(contents)]


def shared(*contents: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(contents)]


def pku(better: Any, safer: Any) -> dict[str, Any]:
    labels = {"better_response_id": better, "safer_response_id": safer}
    safe = {"is_response_0_safe": True, "is_response_1_safe": False}
    return {"prompt": "Why?", "response_0": "Because.", "response_1": "No idea.", **safe, **labels}


HELLO = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
ANSWERS = [{"answer": text, "rank": float(rank)} for text, rank in (("so", 2), ("Because.", 1), ("No idea.", 3))]
SUMMARIES = [{"text": " no idea", "policy": "sup1"}, {"text": " because", "policy": "sup2"}]

PUBLISHED = {
    "texts": Published(
        {"prompt": "Q: Why?\nA:", "chosen": " Because.", "rejected": " No idea.", "id": 3},
        "prompt, chosen, rejected", "Q: Why?\nA:", " Because.", " No idea.",
    ),
    "repeated prompt": Published(
        {"prompt": "Q: Why?\nA:", "chosen": "Q: Why?\nA: Because.", "rejected": "Q: Why?\nA: No idea."},
        "prompt, chosen, rejected (responses that repeat the prompt", "Q: Why?\nA:", " Because.", " No idea.",
    ),
    "repeated prompt, turn not opened": Published(
        {"prompt": "\n\nHuman: Why?", "chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected":
         "\n\nHuman: Why?\n\nAssistant: No."},
        "prompt, chosen, rejected (resp", "\n\nHuman: Why?\n\nAssistant:", " So.", " No.",
    ),
    "HH-RLHF": Published(
        {"chosen": f"{HELLO} Because.", "rejected": f"{HELLO} No idea."},
        "whole transcripts, as HH-RLHF", HELLO, " Because.", " No idea.",
    ),
    "rendered transcripts": Published(
        {"chosen": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.", "rejected":
         "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSorry."},
        "whole transcripts", "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.", "Sorry.",
    ),
    "PKU-SafeRLHF": Published(pku(0, 1), "PKU-SafeRLHF", ["Why?"], "Because.", "No idea."),
    "PKU-SafeRLHF, safer": Published(pku(0, 1), "PKU-SafeRLHF", ["Why?"], "No idea.", "Because.", "safer"),
    "UltraFeedback binarized": Published(
        {"prompt": "Why?", "prompt_id": "7", "chosen": said("Why?", "Because."), "rejected": said("Why?", "No idea."),
         "messages": said("Why?", "Because."), "score_chosen": 8.0, "score_rejected": 3.5},
        "prompt, chosen, rejected (messages)", ["Why?"], "Because.", "No idea.",
    ),
    "conversations of several turns": Published(
        {"chosen": said("hi", "Hello.", "Why?", "Because."), "rejected": said("hi", "Hello.", "Why?", "No idea.")},
        "whole conversations", ["hi", "Hello.", "Why?"], "Because.", "No idea.",
    ),
    "system turn": Published(
        {"prompt": said("Be kind.", "Why?", roles=("system", "user")),
         "chosen": said("Because.", roles=("assistant",)), "rejected": "No idea."},
        "prompt, chosen, rejected", ["Be kind.", "Why?"], "Because.", "No idea.",
    ),
    "prompt and whole conversation": Published(
        {"prompt": said("Why?"), "chosen": said("Be kind.", "Why?", "Because.", roles=("system", "user", "assistant")),
         "rejected": said("Be kind.", "Why?", "No idea.", roles=("system", "user", "assistant"))},
        "prompt, chosen, rejected (messages)", ["Be kind.", "Why?"], "Because.", "No idea.",
    ),
    "ShareGPT": Published(
        {"conversations": shared("Why?"), "chosen": {"from": "gpt", "value": "Because."},
         "rejected": {"from": "gpt", "value": "No idea."}},
        "conversations, chosen, rejected", ["Why?"], "Because.", "No idea.",
    ),
    "Orca": Published(
        {"system": "Be kind.", "question": "Why?", "chosen": "Because.", "rejected": "No idea."},
        "system, question, chosen, rejected", ["Be kind.", "Why?"], "Because.", "No idea.",
    ),
    "Orca of Argilla": Published(
        {"system": "", "input": "Why?", "chosen": "Because.", "rejected": "No idea.", "status": "unchanged",
         "rating": [9.0, 7.0], "chosen_score": 9.0},
        "system, input, chosen, rejected", ["Why?"], "Because.", "No idea.",
    ),
    "Alpaca's columns": Published(
        {"instruction": "Translate.", "input": "Warum?", "chosen": "Why?", "rejected": "What?"},
        "instruction, chosen, rejected", ["Translate.\nWarum?"], "Why?", "What?",
    ),
    "Stanford SHP": Published(
        {"post_id": "a", "history": "Why?", "human_ref_A": "No idea.", "human_ref_B": "Because.", "labels": 0,
         "score_A": 2, "score_B": 9},
        "Stanford SHP", ["Why?"], "Because.", "No idea.",
    ),
    "WebGPT": Published(
        {"question": {"dataset": "eli5", "full_text": "Why?"}, "answer_0": "No idea.", "answer_1": "Because.",
         "score_0": -0.5, "score_1": 0.5},
        "WebGPT comparisons", ["Why?"], "Because.", "No idea.",
    ),
    "AlpacaFarm": Published(
        {"instruction": "Why?", "input": "", "output_1": "No idea.", "output_2": "Because.", "preference": 2},
        "AlpacaFarm", ["Why?"], "Because.", "No idea.",
    ),
    "HelpSteer2": Published(
        {"prompt": "Why?", "response_1": "Because.", "response_2": "No idea.", "preference_strength": -2},
        "HelpSteer2", ["Why?"], "Because.", "No idea.",
    ),
    "HelpSteer3": Published(
        {"context": said("Why?"), "response1": "No idea.", "response2": "Because.", "overall_preference": 1},
        "HelpSteer3", ["Why?"], "Because.", "No idea.",
    ),
    "Chatbot Arena": Published(
        {"conversation_a": said("Why?", "No idea."), "conversation_b": said("Why?", "Because."), "winner": "model_b"},
        "Chatbot Arena", ["Why?"], "Because.", "No idea.",
    ),
    "summaries": Published(
        {"info": {"post": "Why?"}, "summaries": SUMMARIES, "choice": 1, "worker": "w"},
        "summarize_from_feedback", ["Why?"], " because", " no idea",
    ),
    "Nectar": Published(
        {"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": ANSWERS},
        "Nectar", "\n\nHuman: Why?\n\nAssistant: ", "Because.", "No idea.",
    ),
    "Stack Exchange": Published(
        {"question": "Why?", "answers": [{"text": "No idea.", "pm_score": 0}, {"text": "Because.", "pm_score": 5}]},
        "Stack Exchange preferences", ["Why?"], "Because.", "No idea.",
    ),
    "UltraFeedback": Published(
        {"instruction": "Why?", "completions": [{"response": "No idea.", "overall_score": 2.0},
                                                {"response": "Because.", "overall_score": 8.5}]},
        "UltraFeedback", ["Why?"], "Because.", "No idea.",
    ),
}  # fmt: skip
