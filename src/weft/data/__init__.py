"""From files and hub data sets to tokens, loss masks and batches.

    examples = load_examples("train.jsonl")                     # reads, recognises the kind, says it
    print(examples.summary())                                   # train.jsonl: 8,000 examples of {prompt, completion} …
    train, valid = examples.split(0.1, seed=0)                  # rows with one prompt stay on one side
    encoded = encode(train, tokenizer, max_length=512)          # tokens and loss masks, compact
    print(encoded.account.summary())                            # what was truncated, split, dropped; with row numbers
    packed = pack(encoded, 512)                                 # or a LengthGroupedSampler over encoded.lengths
    collate = collator(tokenizer, encoded.kind, packed=packed.packed)
    batch = collate([packed[0], packed[1]])                     # a dict of tensors for ``model(**batch)``

Reading::

    load_examples(source, *, columns=None, limit=None, kind=None, labels=None) -> Examples
        source: a path (.jsonl .json .csv .tsv .parquet .txt, each also with .gz), a folder of `Dataset.save_to_disk`,
                "org/name[:config][@split]" on the hub, a `datasets.Dataset`, or a list of dicts
        columns: {"prompt": "question", "completion": "answer"} where the file's columns have other names
        kind:    one of KINDS, where a file could be read in several ways; None: recognised (the precedence is KINDS)
        labels:  label names of the training set, for an evaluation set
    Examples: .kind .rows .numbers .labels .source .notes .digest len() [i]
              .summary() -> str                        one line
              .split(fraction=0.1, *, seed=0) -> (Examples, Examples)
              .take(n) -> Examples                     the first n rows
              .as_chat(system=None) -> Examples        {prompt, completion} as two messages, for instruct models
              .where(i) -> "train.jsonl, line 18"
    overlap(train, evaluation) -> Overlap: .rows .prompts .count .warning() ("" where there is none)

    read_table(source) -> Table: .rows .numbers .where(i)   rows as they stand, of no kind yet; a Table is a source too

Rows by kind (extra columns are kept in the rows and ignored)::

    "chat"            {"messages": [{"role", "content"}, …]}, optionally "tools"
    "completion"      {"prompt", "completion"}, optionally "references": other right answers, for metrics only
    "classification"  {"text", "label"}: the label by its name; `Examples.labels` has all, in the order of ids
    "text"            {"text"}

Encoding::

    encode(examples, tokenizer, *, max_length, labels=None, mask_prompt=True, separator="", learn="all",
           chat_template=None) -> Encoded
    Encoded: .kind .labels .max_length .packed .account .lengths (numpy) .rows (numpy: the example of each feature)
             .num_tokens .num_loss_tokens .fill len() [i] .features
        [i] -> {"input_ids", "labels"} (+ "position_ids" when packed), numpy int64; labels an int for classification
             .highest_id (a base needs more embeddings than that)
    Account: .examples .kept .features .tokens .loss_tokens .truncated .prompt_cut .completion_cut .split .empty .masked
             (each a Tally: .count .first) .dropped .notes .summary() .to_dict()

Batches::

    pack(encoded, max_length=None) -> Encoded          first-fit decreasing; .fill says how full the rows are
    require_packing(model)                             DataError unless packed rows give the logits of separate ones
    collator(tokenizer, kind, *, packed=False, pad_to_multiple_of=None) -> a picklable callable; .pad_id
    LengthGroupedSampler(lengths, batch_size, *, seed=0, megabatch=50): iterates one epoch; .set_epoch(e) .indices(e)
    padding_share(lengths, order, batch_size) -> float

Generation::

    prompts(examples, limit=None) -> list[Prompt]      distinct: .prompt (str or messages) .references .row .tools
    encode_prompts(prompts, tokenizer, *, max_length, separator="", chat_template=None) -> list[list[int]]
        exactly the tokens that precede the completion in training; too long: cut from the left

Images::

    read_image(source, *, root=None, max_pixels=MAX_PIXELS) -> Opened: .image (RGB, upright) .remarks; open_image: .image alone
        source: a path (inside of `root`), bytes, {"bytes", "path"}, or an image of Pillow; anything wrong: ImageError
    ImageTransform(size, mean, std, augment=(), fit="crop", resample="bilinear")(image, seed=None) -> (3, H, W) float32

Every refusal is a `weft.errors.DataError` that names the file, the line and the way out. transformers, datasets,
pyarrow and torch are imported when they are needed. This package does not know models, adapters or training.
"""

from __future__ import annotations

from weft.data.account import Account, Tally
from weft.data.batches import Collator, LengthGroupedSampler, collator, padding_share
from weft.data.encode import encode
from weft.data.encoded import IGNORED, Encoded
from weft.data.examples import Examples, Overlap, load_examples, overlap
from weft.data.images import open_image, read_image
from weft.data.kinds import KINDS
from weft.data.packing import pack, require_packing
from weft.data.prompts import Prompt, encode_prompts, prompts
from weft.data.sources import Table, read_table
from weft.data.transforms import ImageTransform

__all__ = [
    "IGNORED",
    "KINDS",
    "Account",
    "Collator",
    "Encoded",
    "Examples",
    "ImageTransform",
    "LengthGroupedSampler",
    "Overlap",
    "Prompt",
    "Table",
    "Tally",
    "collator",
    "encode",
    "encode_prompts",
    "load_examples",
    "open_image",
    "overlap",
    "pack",
    "padding_share",
    "prompts",
    "read_image",
    "read_table",
    "require_packing",
]
