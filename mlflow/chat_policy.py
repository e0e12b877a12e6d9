"""A policy as MLflow serves it: messages in, one answer out, with the decoding settings that were certified.

MLflow opens this file by path (`mlflow models serve -m models:/NAME@champion --env-manager local`). A request:
    {"inputs": [{"messages": [{"role": "user", "content": "how do i clean my lamp ?"}]}]}
"""

from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel


class ChatPolicy(PythonModel):
    """Applies the policy's own chat template, then answers batched, at the certified temperature."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer in float32."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        folder = context.artifacts["policy"]
        self.decoding = context.model_config["decoding"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config = GenerationConfig()  # the certified settings, not what the base came with

    def predict(
        self, context: Any, model_input: list[dict[str, list[dict[str, str]]]], params: Any = None
    ) -> list[str]:
        """Return one answer per list of messages."""
        import torch

        texts = [
            self.tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
            for row in model_input
        ]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        temperature = self.decoding["temperature"]
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        stop = self.decoding["stop"]
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=self.decoding["max_new_tokens"],
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **sampling,
            )
        answers = self.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for string in stop:
            answers = [answer.partition(string)[0] for answer in answers]
        return [answer.strip() for answer in answers]


mlflow.models.set_model(ChatPolicy())
