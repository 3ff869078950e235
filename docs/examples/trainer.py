"""``transformers.Trainer`` with cached soft labels: kdcache provides the batches, Trainer trains.

    python docs/examples/trainer.py CACHE MODEL OUTPUT

Trainer needs a DataLoader. So an iterable data set wraps the loader; its items are complete batches.
"""

import sys
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import kdcache


class CachedEpochs(IterableDataset):
    """Each pass is the next epoch of the loader. An item is a complete batch."""

    def __init__(self, batches) -> None:
        self.batches, self.epoch = batches, 0

    def __len__(self) -> int:
        return self.batches.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.batches.batches(self.epoch):
            yield {**batch.inputs, "labels": batch.labels, "teacher_logits": batch.targets.logits}
        self.epoch += 1


class DistillationTrainer(Trainer):
    """Task loss plus soft labels. ``teacher_logits`` [teachers, batch, classes] are part of the batch."""

    def __init__(self, *args, batches, temperature: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.batches, self.soft = batches, kdcache.losses.DistillationLoss(temperature)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(CachedEpochs(self.batches), batch_size=None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ARG002 - by Trainer
        labels, teacher_logits = inputs.pop("labels"), inputs.pop("teacher_logits")
        outputs = model(**inputs)
        loss = kdcache.losses.task_loss(outputs.logits, labels) + self.soft(outputs.logits, teacher_logits, labels)
        return (loss, outputs) if return_outputs else loss


def main(cache_path: str, model_name: str, output: str, epochs: int = 1, batch_size: int = 16) -> float:
    """Train. Returns the mean training loss."""
    cache = kdcache.open_cache(cache_path)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    names = cache.task.label_names
    student = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=len(names), dtype=torch.float32)
    batches = kdcache.loader(cache, tokenizer, batch_size=batch_size)
    arguments = TrainingArguments(
        output, num_train_epochs=epochs, learning_rate=5e-5, seed=0, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = DistillationTrainer(student, arguments, train_dataset=CachedEpochs(batches), batches=batches)
    result = trainer.train()
    trainer.save_model(output)
    tokenizer.save_pretrained(output)
    return result.training_loss


if __name__ == "__main__":
    print(f"mean loss {main(*sys.argv[1:4]):.4f}", file=sys.stderr)
