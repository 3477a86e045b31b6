"""Guided answers in the form that a grammar asks for, another one in each row: `python examples/grammar.py [QUESTION]`.

A grammar library knows which tokens may come next and sets their bits in a mask; `guided_step` draws among them. The
library here is llguidance (`pip install llguidance`). xgrammar's masks have the same layout: `fill_next_token_bitmask`
and `accept_token` of its GrammarMatcher go into the same two places. The models are those of minimal_decoder.py. They
have never read JSON, and what they put into it reads accordingly.
"""

import sys
from functools import partial

import torch
from llguidance import LLMatcher, hf
from llguidance.torch import fill_next_token_bitmask
from transformers import AutoTokenizer

from genarm import bundled
from genarm_kernels import guided_step, run_concurrently, token_mask
from minimal_decoder import BASE, QUESTIONS, WEIGHTS, load

SENTENCE = r"[A-Z][a-z0-9 ]{10,60}\."
SCHEMA = {
    "type": "object",
    "properties": {
        "advice": {"type": "string", "pattern": f"^{SENTENCE}$"},
        "minutes": {"type": "integer", "minimum": 1, "maximum": 90},
    },
    "required": ["advice", "minutes"],
    "additionalProperties": False,
}
GRAMMARS = {
    "no grammar": None,
    "yes or no": LLMatcher.grammar_from_regex(r" (Yes|No), [^\n]+"),
    "a list": LLMatcher.grammar_from_lark(f'start: ("\\n- " SENTENCE)~3\nSENTENCE: /{SENTENCE}/'),
    "JSON": LLMatcher.grammar_from_json_schema(SCHEMA, defaults={"whitespace_flexible": False}),
}
MAX_NEW_TOKENS = 100


@torch.inference_mode()
def answers(question: str, seed: int = 0) -> list[str]:
    """One answer to the question for each of `GRAMMARS`."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"]] * len(GRAMMARS)
    models = [load(BASE), *(load(bundled.path(name)) for name in WEIGHTS)]

    vocabulary = hf.from_tokenizer(tokenizer)
    matchers = [grammar and LLMatcher(vocabulary, grammar) for grammar in GRAMMARS.values()]
    mask = token_mask.allocate(len(matchers), vocabulary.vocab_size)  # on the CPU, where the library fills it
    rows: list[list[int]] = [[] for _ in matchers]
    logits = run_concurrently(*(partial(model.prefill, prompts) for model in models))
    for position in range(MAX_NEW_TOKENS):
        for b, matcher in enumerate(matchers):
            if matcher:  # the row without one stays as allocated: every token is allowed
                fill_next_token_bitmask(matcher, mask, b)
                if matcher.is_error():  # a grammar that cannot be read, above all
                    raise ValueError(f"{list(GRAMMARS)[b]}: {matcher.get_error()}")
        step = guided_step(
            logits[0],
            logits[1:],
            list(WEIGHTS.values()),
            top_p=0.9,  # of the mass of the allowed tokens
            seed=seed,
            position=position,
            token_mask=mask.to(logits[0].device),
            vocab_size=vocabulary.vocab_size,
        )
        step.raise_for_status()
        for row, matcher, token in zip(rows, matchers, step.token.tolist(), strict=True):
            if tokenizer.eos_token_id not in row:
                row.append(token)
                if matcher:
                    matcher.consume_token(token)
        if all(tokenizer.eos_token_id in row for row in rows):
            break
        logits = run_concurrently(*(partial(model.step, step.token) for model in models))
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def main(question: str) -> None:
    print(question)
    for name, text in zip(GRAMMARS, answers(question), strict=True):
        print(f"\n{name}:\n{text.strip()}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else QUESTIONS[0])
