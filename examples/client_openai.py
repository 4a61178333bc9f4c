"""Talk to `lorikit serve` with OpenAI's client: one answer, one as it comes, and several at a time.

lorikit serve runs/demo
python examples/client_openai.py [URL]            needs: pip install openai
"""

import asyncio
import os
import sys

from openai import AsyncOpenAI, OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
KEY = os.environ.get("LORIKIT_API_KEY", "none")


def main() -> None:
    """Three ways to ask."""
    client = OpenAI(base_url=URL, api_key=KEY)
    model = client.models.list().data[0].id  # the first run; the base is a model too
    question = {"role": "user", "content": "Who are you?"}

    answer = client.chat.completions.create(model=model, messages=[question], max_tokens=64)
    print(f"{model}: {answer.choices[0].message.content}")

    print("as it comes: ", end="")
    for chunk in client.chat.completions.create(model=model, messages=[question], max_tokens=64, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    for text in asyncio.run(several(model, ["What do you like?", "What do you fear?", "Good night!"])):
        print(f"- {text}")


async def several(model: str, questions: list[str]) -> list[str | None]:
    """The answers to all questions, asked at the same time."""
    async with AsyncOpenAI(base_url=URL, api_key=KEY) as client:
        create = client.chat.completions.create
        asked = (create(model=model, messages=[{"role": "user", "content": q}], max_tokens=64) for q in questions)
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]


if __name__ == "__main__":
    main()
