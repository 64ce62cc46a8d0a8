"""The embedded model's tokenizer: sentencepiece, unigram, 516 pieces, from drawn captions and plain English.

On captions alone it would stop at a hundred pieces and cut the names of colours; the sentences below, written
for this, fill the vocabulary with letters and word parts, so that unknown words are spelled, not lost.
"""

import random
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from benchmarks.demo_model.data import combinations, sample_clips
from minidit.text.tokenizers import SentencePiece

VOCAB, TEXT_LEN = 516, 32
# One piece each: so small a text encoder does not learn in time which of two equal bags of words it reads.
PHRASES = ("left to right", "right to left", "bottom to top", "top to bottom")

PLAIN_ENGLISH = """
A small boat crossed the quiet lake early in the morning while the fishermen were still asleep.
Every evening my grandmother reads the newspaper aloud and laughs at the weather report.
The committee agreed to postpone the decision until all the figures had been checked twice.
Fresh bread, salted butter and a jar of honey were waiting on the kitchen table.
Nobody expected the old clock to work again, but it struck seven exactly on time.
We walked across the bridge, past the library, and stopped at the second crossing.
Her brother studies chemistry at the university and plays the violin at weekends.
If the temperature falls below zero tonight, cover the young plants with straw.
The quick lizard jumped over a lazy cat and vanished behind the broken fence.
They have lived in this village for twenty years and know everybody by name.
Please remember to lock the door, switch off the lights and feed the rabbits.
A group of students asked the professor how mountains are formed under the sea.
The train was delayed because a tree had fallen across the railway line.
In autumn the leaves turn brown, then the wind carries them into the valley.
He bought a used bicycle, repaired the chain and painted the frame himself.
Some questions are easy to ask and very difficult to answer with confidence.
The museum shows drawings, maps and photographs from the beginning of the century.
She wrote a long letter to her friend about the journey through the desert.
Water freezes slowly when it contains salt, which is why oceans rarely freeze.
Children were building castles in the sand as the tide was coming in.
The engineer measured the length of the beam and compared it with the plan.
After the concert the audience stood up and clapped for several minutes.
Owls hunt at night because their eyes and ears are made for the darkness.
The recipe needs two eggs, half a cup of sugar and a pinch of pepper.
An honest answer is worth more than a clever excuse, my teacher used to say.
The kite went higher and higher until it was only a dot above the fields.
Our neighbours keep bees, and in summer they sell honey in small glass jars.
The doctor explained the treatment patiently and answered every question we had.
It takes about eight minutes for the light of the sun to reach the earth.
The carpenter chose a plank of oak because pine would have been too soft.
Yesterday the market was crowded with people buying vegetables, cheese and flowers.
The child drew a square house with a triangle for a roof and a circle for the sun.
A good map tells you where you are, a better one tells you where you could go.
The orchestra tuned their instruments while the last guests were finding their seats.
Heavy rain washed the gravel from the path and filled the ditch with mud.
The zoo keeper gave the elephants a bath and counted the penguins before lunch.
When the power failed, we lit candles and told each other stories until midnight.
The pilot spoke calmly and announced that we would be landing in fifteen minutes.
Big waves broke against the harbour wall and threw foam over the parked cars.
She learned to swim before she could read, and to sail before she could drive.
The baker gets up at three o'clock so that the rolls are warm when we wake.
Most of the forest is young, since the old trees were cut down for the mines.
Turn right at the church, go straight on, then take the third street on the left.
The scientists repeated the experiment with different materials and larger samples.
A thin layer of dust covered the shelves, the chairs and the unopened boxes.
The winner of the race was so tired that she could hardly hold the trophy.
His explanation was short, precise and completely wrong, as we found out later.
Put the heavy objects at the bottom of the bag and the fragile ones on top.
The gardener pulled out the weeds, watered the roses and trimmed the hedge.
No two snowflakes are alike, or at least nobody has ever found a matching pair.
The ship carried coal, timber and machines from the northern ports to the islands.
An unusual silence lay over the city on the first morning of the holiday.
You can fold a sheet of paper in half seven times, but hardly ever an eighth time.
The judge listened to both sides and then asked for a short adjournment.
A yellow taxi stopped in front of the hotel, and a tall woman stepped out.
The dog chased its own tail, grew dizzy and lay down in the shade of the wall.
Although the road was narrow and steep, the bus climbed it without trouble.
The price of coffee has risen sharply because the harvest was poor this year.
Bring warm clothes, a torch, enough water and something to eat for two days.
The painter mixed blue and yellow until the green matched the colour of the meadow.
"""


def training_text(rng: random.Random, captions: int) -> list[str]:
    """Captions, sentences, and every word with punctuation: a piece is what two different words share."""
    texts = [clip.caption for clip in sample_clips(captions, combinations(), rng)]
    texts += [line for line in PLAIN_ENGLISH.split("\n") if line]
    words = sorted({word.strip(".,") for text in texts for word in text.split()})
    texts += [f"{word}, {word}; {word}." for word in words]
    rng.shuffle(texts)
    return texts


def train_tokenizer(path: Path, *, seed: int = 0, captions: int = 4000) -> None:
    """Write spiece.model. Held-out combinations add no words of their own."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text(random.Random(seed), captions)),
        model_prefix=str(path.with_suffix("")),
        model_type="unigram",
        vocab_size=VOCAB,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",  # folds case
        user_defined_symbols=["\u2581" + phrase.replace(" ", "\u2581") for phrase in PHRASES],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )


def encode(captions: list[str], tokenizer: SentencePiece) -> tuple[Tensor, Tensor]:
    """Ids padded to the longest caption, and 1 where there is a token. -> two (B, M) int64"""
    rows = [torch.tensor(tokenizer.encode(caption, TEXT_LEN)) for caption in captions]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()
