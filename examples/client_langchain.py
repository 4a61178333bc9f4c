"""A LangChain chain on `lorikit serve`: a prompt with two places, the model, plain text out.

lorikit serve runs/demo
python examples/client_langchain.py [MODEL] [URL]            needs: pip install langchain-openai
"""

import os
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo"
URL = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1"


def main() -> None:
    """Whole, as it comes, and several at a time."""
    model = ChatOpenAI(base_url=URL, api_key=os.environ.get("LORIKIT_API_KEY", "none"), model=MODEL, max_tokens=64)
    prompt = ChatPromptTemplate.from_messages([("system", "You talk to {name}."), ("user", "{question}")])
    chain = prompt | model | StrOutputParser()
    print(chain.invoke({"name": "Ada", "question": "Who are you?"}))
    for piece in chain.stream({"name": "Ada", "question": "What do you like?"}):
        print(piece, end="", flush=True)
    print()
    print(chain.batch([{"name": name, "question": "Good night!"} for name in ("Ada", "Bo")]))


if __name__ == "__main__":
    main()
