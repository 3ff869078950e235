"""A plain PyTorch training loop over a kdcache cache: no kdcache trainer, no teacher, about forty lines.

    python docs/examples/plain_loop.py CACHE MODEL OUTPUT

CACHE is a directory from ``kdcache dump-teachers``. MODEL is a Hugging Face directory or hub name. OUTPUT is the
directory where the student is saved.
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import kdcache


def main(cache_path: str, model_name: str, output: str, epochs: int = 1, batch_size: int = 16) -> float:
    """Train with the task loss, soft labels and hidden states of all teachers. Returns the last loss."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = kdcache.open_cache(cache_path)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    names = cache.task.label_names
    student = AutoModelForSequenceClassification.from_pretrained(
        model_name, num_labels=len(names), dtype=torch.float32
    ).to(device)
    layers, width = student.config.num_hidden_layers, student.config.hidden_size

    batches = kdcache.loader(cache, tokenizer, batch_size=batch_size, student_layers=layers)
    pairs = {
        (i, j): (name, own)
        for i, name in enumerate(batches.teachers)
        for j, own in enumerate(batches.layer_map[name], 1)
    }
    dims = {pair: batches.target_dim(*layer) for pair, layer in pairs.items()}
    variances = {pair: batches.target_variance(*layer) for pair, layer in pairs.items()}
    soft = kdcache.losses.DistillationLoss(temperature=1.0)
    projections = kdcache.losses.HiddenProjections(dims, width, "student-to-teacher").to(device)
    optimizer = torch.optim.AdamW([*student.parameters(), *projections.parameters()], lr=5e-5)

    loss = torch.zeros(())
    for epoch in range(epochs):
        for batch in batches.batches(epoch):
            batch = batch.to(device)  # targets are sent quantised and decoded on the device
            outputs = student(**batch.inputs, output_hidden_states=True)
            sides = projections(outputs.hidden_states, batch.targets.hidden)
            errors = {pair: kdcache.losses.mean_squared_error(*side) for pair, side in sides.items()}
            hidden = kdcache.losses.balanced_mean(kdcache.losses.share_of_variance(errors, variances))
            task = kdcache.losses.task_loss(outputs.logits, batch.labels)
            loss = task + soft(outputs.logits, batch.targets.logits, batch.labels) + 0.1 * hidden
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, coverage {batches.coverage}", file=sys.stderr)
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return loss.item()


if __name__ == "__main__":
    main(*sys.argv[1:4])
