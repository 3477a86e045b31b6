"""Models of the hub: `python examples/hub_models.py [--base NAME] [--arm NAME WEIGHT ...] [PROMPT]`.

Each name is one of the hub or a folder. The base is any transformers causal language model. An ARM is another one with
the same tokenizer, or a LoRA adapter of the base. The default is the pair that the README of the paper's code
(github.com/Yuancheng-Xu/GenARM) names, two models of 7B parameters to be downloaded. Its settings there, alpha 1 and
temperature 1 / (1 + alpha), are weight 1 and temperature 1 here.

An ARM of your own is trained on pairs of a better and a worse answer, for instance:

    genarm train --base meta-llama/Llama-3.1-8B-Instruct --data Anthropic/hh-rlhf --out my-arm
    python examples/hub_models.py --base meta-llama/Llama-3.1-8B-Instruct --arm my-arm 1.0
"""

import argparse
from collections.abc import Sequence
from statistics import mean

from genarm import GuidedDecoder

BASE, ARM = "allenai/tulu-2-7b", "YuanchengXu/AutoregressiveRM-tulu2-7b"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="An answer without guidance, and one guided by ARMs.")
    parser.add_argument("--base", metavar="NAME", help=f"default: {BASE}")
    parser.add_argument("--arm", metavar=("NAME", "WEIGHT"), nargs=2, action="append", help=f"default: {ARM} 1.0")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="How do I sleep better?")
    given = parser.parse_args(arguments)
    if (given.base is None) != (given.arm is None):
        parser.error("--base and --arm: expected both or neither, as an ARM shares the vocabulary of its base")
    arms = {name: float(weight) for name, weight in given.arm or [(ARM, 1.0)]}

    decoder = GuidedDecoder.from_pretrained(given.base or BASE, {name: name for name in arms})
    templated = decoder.tokenizer.chat_template
    prompt = [{"role": "user", "content": given.prompt}] if templated else given.prompt
    result = decoder.generate(
        [prompt, prompt],
        weights=[dict.fromkeys(arms, 0.0), arms],  # an ARM of weight 0 steers nothing and says its reward all the same
        max_new_tokens=given.max_new_tokens,
        top_p=0.9,
        seed=[given.seed, given.seed],
    )
    print(given.prompt)
    for b, title in enumerate(("without guidance", "guided")):
        print(f"\n{title}: {result.texts[b].strip()}")
        for name, weight in arms.items():
            print(f"  {mean(result.rewards[name][b]):.2f} nats a token by {name}, weight {weight if b else 0:g}")


if __name__ == "__main__":
    main()
