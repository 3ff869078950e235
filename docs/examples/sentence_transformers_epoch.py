"""One epoch of sentence-transformers on an exported cache: a classifier that imitates a teacher's logits.

kdcache cache export CACHE --output-dir EXPORT
python sentence_transformers_epoch.py EXPORT TEACHER ENCODER
"""

import sys

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MSELoss
from sentence_transformers.models import Dense
from torch import nn

directory, teacher, encoder = sys.argv[1:]
rows = load_dataset(directory, split="train").select_columns(["sentence", f"logits_{teacher}"])
rows = rows.rename_column(f"logits_{teacher}", "label")
model = SentenceTransformer(encoder)
width, classes = len(model.encode("a text")), len(rows[0]["label"])
model.append(Dense(width, classes, activation_function=nn.Identity()))
arguments = SentenceTransformerTrainingArguments("st-output", num_train_epochs=1, report_to="none", save_strategy="no")
SentenceTransformerTrainer(model, args=arguments, train_dataset=rows, loss=MSELoss(model)).train()
held_out = load_dataset(directory, split="validation")
right = model.encode(held_out["sentence"]).argmax(axis=1) == held_out["label"]
print(f"validation accuracy {right.mean():.4f}")
model.save_pretrained("st-student")
