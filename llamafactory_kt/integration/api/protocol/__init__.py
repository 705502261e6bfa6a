"""A request to ``/v1/chat/completions``, as OpenAI's API has it: the fields that LLaMA-Factory knows, with OpenAI's types.

LLaMA-Factory's own models (``api/protocol.py``) refuse what OpenAI's API takes, such as ``null`` for a default, and take what it
refuses, such as a tool without a function, which then fails inside. Unknown fields of a request are refused; those of a message are not
looked at, since clients send back what other servers have answered.

https://platform.openai.com/docs/api-reference/chat/create
"""
