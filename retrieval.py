"""Episodes: training windows in which a skip of PoSE stands between facts and the questions about them.

A PoSE window teaches a model to read at far positions, but nothing in it asks the model to find something
there. An episode asks. It is a stretch of one of the user's documents with lines put in between:

    chunk 0     It had rained since morning, and the road to the mill was under water.
                The clerk entered 4711 as the locker number of Ada Farrow.                a fact
                Nobody spoke until the carriage stopped. "We are late," said the driver.
                The clerk entered 8265 as the locker number of Ada Jessop.                another fact
    -- skip u --
    chunk 1     He paid and went in. The hall was cold, and the lamps were not lit.
                Which locker number belongs to Ada Farrow? It is 4711.                    a question
                Upstairs a door was opened and shut again.

Questions stand in the last chunk alone, and facts in those before it. So most questions look back across a
skip, as far as the target window reaches, although the window itself is short. Names and values are random:
only the window tells the answer. Many facts of one kind, names that differ in one part, several values of a
name and values handed on from name to name make it hard enough to be of use. No sentence is one of the tests
in tasks/, which are to measure a skill and not sentences learned by heart. All are English, in any text.

Every target has a weight in the loss: in the text 1, or 0 where only answers count, as in any other window;
0 in facts, in what a question says before its answer, and at the line breaks before both, since nothing in
the window foretells them; and ANSWER_WEIGHT in answers and at the token behind each, for a model must also
know where an answer ends.
"""

import numpy as np

from hf.tokenizer import ids_of_line, line_ends, token_texts

ANSWER_WEIGHT = 6.0
CHUNKS = (2, 2, 3, 4)  # chunks in a window, one of these
LAST_CHUNK = (0.1, 0.45)  # the last chunk's share of the window, uniform
FEWEST_IN_LAST_CHUNK = 96  # tokens; a question with its answer has about 30
NO_SKIP, SHORT_SKIP = 0.15, 0.15  # shares of windows without skips, and with log-uniform skips
DENSE, REPEATED = 0.15, 0.1  # shares of windows nearly full of facts, and of windows that repeat one passage
TOKENS_A_FACT = (50, 300)  # before the last chunk, log-uniform
TOKENS_BETWEEN_QUESTIONS = (4, 50)  # log-uniform
BLOCK = 0.3  # share of windows in which all questions follow one another
NEAR = 0.35  # share of lookups whose names are nearly equal; in half as many, the values are
SEVERAL = 0.15  # share of lookups in which a name has several values
GROUPED = 0.15  # share of the questions of other lookups that ask for several names at once


# ---------------------------------------------------------------- the window


def episode(rng, document, length, target_len, tokenizer, weights=None):
    """Draw an episode and return (tokens, positions, targets, weights), each of shape (length,).

    The first three are int64, the weights float32. Positions are strictly increasing and below target_len.
    targets[i] is the token that follows tokens[i], and weights[i] is its weight in the loss. Return None if
    the window is too short for a fact and its question.

    rng: the numpy Generator that everything is drawn with. document: at least length + 1 ids of one text, a
    1-d array. length: tokens in the window. target_len: where positions end, at least `length`. weights: what
    each token of the document counts in the loss, float32, by default 1.
    """
    last = max(round(rng.uniform(*LAST_CHUNK) * length), min(FEWEST_IN_LAST_CHUNK, length // 2))
    first = length + 1 - last  # tokens before the last chunk; with the last target there are length + 1
    style = rng.choice(("plain", "dense", "repeated"), p=(1 - DENSE - REPEATED, DENSE, REPEATED))
    facts, questions = draw_lines(rng, tokenizer, first, last, style == "dense")
    if not questions:
        return None
    lines = facts + questions
    lengths = [line.shape[1] for line in lines]

    n_text = length + 1 - sum(lengths)
    seam = first - sum(lengths[: len(facts)])  # tokens of the text before the last chunk
    weights = np.ones(n_text) if weights is None else weights[:n_text]
    text = np.stack([document[:n_text], weights])  # ids and weights
    ends = line_ends(tokenizer, document[:n_text])
    if style == "repeated":
        passage = rng.integers(12, 80)
        text[0] = np.resize(document[:passage], n_text)
        text[1, passage:] = 0.0  # repeating a passage teaches nothing
        ends = np.arange(0, n_text, passage)

    fact_places = np.sort(rng.choice(ends[ends <= seam], len(facts)))
    n_places = 1 if rng.random() < BLOCK else len(questions)
    question_places = np.sort(rng.choice(np.append(ends[ends > seam], seam), n_places))
    places = np.append(fact_places, np.resize(question_places, len(questions)))
    window = np.insert(text, np.repeat(places, lengths), np.concatenate(lines, axis=1), axis=1)
    ids, weights = window[0].astype(np.int64), window[1].astype(np.float32)

    begins = places + np.cumsum(lengths) - lengths  # where each line begins in the window
    positions = draw_positions(rng, length, target_len, begins[: len(facts)], first)
    return ids[:-1], positions, ids[1:], weights[1:]


def draw_lines(rng, tokenizer, room_for_facts, room_for_questions, dense):
    """Draw facts and questions about them, and return two lists of encoded lines, in their order.

    The rooms are in tokens. dense: whether facts take nearly all of their room, or half of it at most. There
    are as many questions as fit, and a fact is asked for once at most.
    """
    free = room_for_facts * (0.93 if dense else 0.5)
    most_facts = room_for_facts if dense else room_for_facts / log_uniform(rng, *TOKENS_A_FACT)
    kinds = kinds_of_facts(rng, dense)
    ranked, drawn, misfits = [], [], 0  # (rank, encoded fact) pairs, and the questions about them
    while len(ranked) < most_facts and misfits < 10:
        facts, question = next(kinds)
        encoded = [encode_line(tokenizer, [(fact, "")]) for fact in facts]
        needed = sum(line.shape[1] for line in encoded)
        if needed > free:
            misfits += 1
            continue
        free -= needed
        ranked += zip(np.sort(rng.random(len(facts))), encoded)  # facts of one question keep their order
        drawn.append(question)
    ranked.sort(key=lambda pair: pair[0])

    gap = log_uniform(rng, *TOKENS_BETWEEN_QUESTIONS)
    free = 0.97 * room_for_questions + gap  # the first question needs no text before it
    questions = []
    for i in rng.permutation(len(drawn)):
        question = encode_line(tokenizer, drawn[i])
        needed = question.shape[1] + gap
        if needed <= free:
            free -= needed
            questions.append(question)
    return [fact for _, fact in ranked], questions


def encode_line(tokenizer, segments):
    """Return the ids and the weights of a line with a line break on both sides, an array of shape (2, n).

    segments: the line as a list of (given, answer), strings that follow one another.
    """
    ids = ids_of_line(tokenizer, "".join(given + answer for given, answer in segments) + "\n")
    texts = token_texts(tokenizer)
    ends = np.cumsum([len(texts[i]) for i in ids])  # in characters
    begins = np.append(0, ends[:-1])
    weights = np.zeros(len(ids))
    place = 1  # behind the first line break
    for given, answer in segments:
        place += len(given)
        if answer:  # The token that begins where the answer ends is weighted too.
            weights[(ends > place) & (begins <= place + len(answer))] = ANSWER_WEIGHT
        place += len(answer)
    return np.stack([ids, weights])


def draw_positions(rng, length, target_len, fact_begins, last_begin):
    """Draw the positions of a window, int64 (length,).

    The last chunk begins at last_begin, and those between it and the first one at facts. What the skips add
    never decreases, from 0 to target_len - length. A single uniform one is the u of pose.sample.
    """
    inner = np.unique(fact_begins[fact_begins > 0])
    n_inner = min(rng.choice(CHUNKS) - 2, len(inner))
    cuts = [0, *np.sort(rng.choice(inner, n_inner, replace=False)), last_begin, length]
    most = target_len - length
    skips = rng.integers(0, most, n_inner + 1, endpoint=True)
    chance = rng.random()
    if chance < NO_SKIP:
        skips[:] = 0
    elif chance < NO_SKIP + SHORT_SKIP:
        skips = [int(log_uniform(rng, 1, most + 1)) - 1 for _ in skips]
    return np.arange(length) + np.repeat([0, *np.sort(skips)], np.diff(cuts))


# ---------------------------------------------------------------- kinds of facts


def kinds_of_facts(rng, dense):
    """Yield (facts, question) without end: facts are lines, a question is a list of (given, answer).

    A window mixes one to four kinds, and a dense one has a single lookup. A kind whose names run out is
    replaced by a new lookup.
    """
    used = set()  # (attribute, name) pairs of the whole window: a name must have one meaning in it
    n = 1 if dense else rng.integers(1, 4, endpoint=True)
    drawn = [lookup] if dense else rng.choice((lookup, chain, lone), n, p=(0.82, 0.12, 0.06))
    kinds = [kind(rng, used) for kind in drawn]
    while True:
        i = rng.integers(n)
        item = next(kinds[i], None)
        if item is None:
            kinds[i] = lookup(rng, used)
        else:
            yield item


def lookup(rng, used):
    """Yield facts that give a name one value or several. The question asks for the values in their order."""
    in_words, several = rng.random() < 0.15, rng.random() < SEVERAL
    key_parts = draw_parts(rng, KEYS, near=rng.random() < NEAR)
    value_parts = draw_parts(rng, WORD_VALUES if in_words else VALUES, near=rng.random() < NEAR / 2)
    attributes = rng.permutation(WORD_ATTRIBUTES if in_words else NUMBER_ATTRIBUTES)
    attributes = attributes[: 1 if rng.random() < 0.7 else 3]
    n_sentences = 1 if rng.random() < 0.7 else 10
    statements = [pick(rng, STATEMENTS) for _ in range(n_sentences)]
    questions = [pick(rng, pick(rng, ONE_VALUE)) for _ in range(n_sentences)]
    while True:
        what = pick(rng, attributes)
        n_keys, n_values, sentences = 1, 1, questions
        if several:
            n_values, sentences = rng.integers(2, 6, endpoint=True), SEVERAL_VALUES
        elif rng.random() < GROUPED:
            n_keys, sentences = rng.integers(2, 4, endpoint=True), SEVERAL_KEYS
        keys = draw_unused(rng, key_parts, n_keys, used, what)
        values = draw_unused(rng, value_parts, n_values * len(keys), set())
        if not values:
            return
        facts = []
        for key, value in zip(np.repeat(keys, n_values), values):
            facts.append(pick(rng, statements).format(what=what, key=key, value=value))
        if n_keys > 1:
            rng.shuffle(facts)  # the question does not follow their order
        names = {"what": what, "key": enumerated(rng, keys), "n": NUMBERS[n_values]}
        yield facts, ask(pick(rng, sentences), enumerated(rng, values), **names)


def chain(rng, used):
    """Yield facts that hand a value on from name to name. The question asks for all names or the value."""
    name_parts, value_parts = draw_parts(rng, CHAIN_NAMES), draw_parts(rng, VALUES)
    first_step, next_step = pick(rng, CHAIN_STEPS)
    while True:
        n = rng.integers(2, 6, endpoint=True)
        names, values = draw_unused(rng, name_parts, n, used), draw_unused(rng, value_parts, 1, used)
        if not names or not values:
            return
        start = values[0]
        facts = [first_step.format(name=names[0], start=start)]
        for earlier, name in zip(names, names[1:]):
            facts.append(next_step.format(name=name, earlier=earlier))
        if rng.random() < 0.3:
            yield facts, ask(pick(rng, CHAIN_ENDS), start, name=names[-1])
        else:
            yield facts, ask(pick(rng, CHAINS), enumerated(rng, names), start=start, n=NUMBERS[n])


def lone(rng, used):
    """Yield one or a few facts that need no name, because no other fact is like them."""
    value_parts = draw_parts(rng, VALUES)
    for what in draw_unused(rng, [LONE_THINGS], rng.geometric(0.7), used):
        value = draw_unused(rng, value_parts, 1, set())[0]
        fact = pick(rng, LONE_STATEMENTS).format(what=what, value=value)
        yield [fact], ask(pick(rng, LONE_QUESTIONS), value, what=what)


def ask(sentence, answer, **names):
    """Return the question as a list of (given, answer). The space before an answer belongs to the answer."""
    before, after = [part.format(**names) for part in sentence.split("{value}")]
    given = before.rstrip(" ")
    return [(given, before[len(given) :] + answer), (after, "")]


def enumerated(rng, items):
    """Return "a", "a, b, c" or "a, b and c"."""
    if len(items) == 1 or rng.random() < 0.5:
        return ", ".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]


# ---------------------------------------------------------------- names and values


def draw_parts(rng, patterns, near=False):
    """Draw a pattern, and return for each of its characters the list of strings that it can stand for.

    near: make all strings of the pattern nearly equal. A word is one of five then, and of single characters
    only the last two vary.
    """
    parts = [PARTS.get(character, [character]) for character in pick(rng, patterns)]
    if near:
        for i, choices in enumerate(parts):
            if len(choices[0]) > 1:
                parts[i] = rng.choice(choices, 5, replace=False)
            elif i < len(parts) - 2:
                parts[i] = [pick(rng, choices)]
    return parts


def draw_unused(rng, parts, n, used, attribute=""):
    """Return n strings that are not in `used` for this attribute, and add them to it.

    A string has one choice of each part. Return [] if hardly any are left.
    """
    strings = []
    for _ in range(20 * n):
        string = "".join([pick(rng, choices) for choices in parts])
        if (attribute, string) not in used:
            used.add((attribute, string))
            strings.append(string)
        if len(strings) == n:
            return strings
    return []


def pick(rng, choices):
    """Draw one of the choices, all equally likely."""
    return choices[rng.integers(len(choices))]


def log_uniform(rng, low, high):
    """Draw a float between low and high whose logarithm is uniform."""
    return np.exp(rng.uniform(np.log(low), np.log(high)))


# ---------------------------------------------------------------- sentences

FORMS = (
    "{key}: {what} {value}", "{key} -> {what} {value};", "| {key} | {what} | {value} |",
    "{what} for {key} = {value}", '{{"name": "{key}", "{what}": "{value}"}}',
)  # fmt: skip
STATEMENTS = FORMS + (
    "The {what} of {key} was given as {value}.", "The clerk entered {value} as the {what} of {key}.",
    "Under {key} the list shows the {what} {value}.", "As for {key}, the {what} came to {value}.",
    "Among the papers of {key} stood this {what}: {value}.", "It was {value} that {key} had for {what}.",
    "The {what} that {key} keeps reads: {value}.", "Write down that {key} has the {what} {value}.",
)  # fmt: skip
QUESTIONS = (
    "Which {what} belongs to {key}?", "Question: {key}, {what}?", "Name the {what} noted for {key}.",
    "Find {key} in the lines above and copy the {what}.", "So which {what} did {key} have?",
    "Somebody asked for the {what} of {key}.", "Tell me the {what} of {key}.", "{key} again: which {what}?",
    "Who recalls which {what} goes with {key}?", "Look up {key} and read out the {what}.",
)  # fmt: skip
SHORT_REPLIES = (
    "It is {value}.", "Answer: {value}.", "The answer is {value}.", "It was {value}.", "There it is {value}.",
    "One reads {value}.", "This {what} is {value}.",
)  # fmt: skip
FULL_REPLIES = (
    "For {key} the {what} is {value}.", "The {what} kept for {key} is {value}.",
    "The {what} that belongs to {key} is {value}.", "As for {key}, the right {what} is {value}.",
    "Beside the name {key} the {what} is {value}.", "{key} has one {what}, which is {value}.",
    "The {what} of {key}, as noted before, was {value}.", "The {what} of {key} was given as {value}.",
    "Looking back for the {what} of {key}, one reads {value}.", "{key} was said to have the {what} {value}.",
    "According to the pages above, the {what} of {key} stood at {value}.",
)  # fmt: skip
ANSWERED = [f"{question} {reply}" for question in QUESTIONS for reply in SHORT_REPLIES + FULL_REPLIES]
ONE_VALUE = (FORMS, FULL_REPLIES, FULL_REPLIES, ANSWERED, ANSWERED, ANSWERED)  # each as likely
SEVERAL_KEYS = (
    "Give the {what} of {key}, in that order: {value}.", "Take {key}: the {what} of each in turn is {value}.",
    "For {key}, one after the other, the entries under {what} are {value}.",
)  # fmt: skip
SEVERAL_VALUES = (
    "List each {what} kept for {key}: {value}.", "All entries for {key} under {what} are {value}.",
    "Asked about {key}, one finds every {what}: {value}.", "As {what} of {key} there stood {value}.",
    "List the {n} entries under {what} for {key}: {value}.", "All {n} cases of {what} for {key} are {value}.",
    "{key} had {n} times a {what}, and in order each is {value}.", "{key}, {what}, {n} of them: {value}.",
)  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
CHAIN_STEPS = (
    ("{name} := {start}", "{name} := {earlier}"), ("set {name} to {start}", "set {name} to {earlier}"),
    ("{name} owns {start}.", "{name} owns the same as {earlier}."),
    ("Put {start} into box {name}.", "Box {name} gets what box {earlier} holds."),
)  # fmt: skip
CHAINS = (
    "Step by step, {start} was handed to {value}.", "All that goes back to {start}, in order: {value}.",
    "Who ended up with {start}? In order, it is {value}.", "The {n} that stand for {start} are {value}.",
    "These {n} names lead back to {start}, in order: {value}.", "In {n} steps {start} came to {value}.",
)  # fmt: skip
CHAIN_ENDS = ("In the end {name} stood for {value}.", "Step by step back from {name}, it holds {value}.")
LONE_STATEMENTS = (
    "Mark well the {what}: {value}. Keep {value} in mind.", "{value} was the {what} of that day.",
    "Here stands the {what}, {value}, and nowhere else.",
)  # fmt: skip
LONE_QUESTIONS = (
    "And the {what}? It is {value}.", "Which {what} was to be kept in mind? It was {value}.",
    "Say the {what} once more: {value}.", "As one reads above, that {what} is {value}.",
)  # fmt: skip

# ---------------------------------------------------------------- words and patterns

NUMBER_ATTRIBUTES = (
    "account balance|badge number|batch number|berth number|box number|cargo weight|case number|"
    "depth in feet|docket number|engine number|grid reference|inventory number|invoice total|"
    "licence number|locker number|lot number|membership number|meter reading|mileage|monthly rent|"
    "order number|parcel number|platform number|postal number|price in pence|seat number|tax number|"
    "telephone extension|ticket number|vote count|yearly wage"
).split("|")
WORD_ATTRIBUTES = (
    "birthday gift|cargo|company sign|crop|destination|emblem|favourite dish|first purchase|"
    "hiding place|instrument|last request|missing item|nickname|prize|trade|watchword"
).split("|")
LONE_THINGS = (
    "answer to the riddle|count at dusk|figure in the margin|line on the envelope|mark on the lid|"
    "pledged amount|reading at noon|stake of the house|sum on the cover|tally of the crew"
).split("|")
FIRST_NAMES = (
    "Ada Agnes Boris Bram Celia Clara Dirk Dorian Edda Elsa Felix Fenn Greta Gwen Hanno Hugo Ilse Ines Jonas "
    "Jory Katya Lorenz Mina Niels Olga Piet Quill Rosa Sven Tilda Ugo Vera Wim Xenia Yara Zeno"
).split()
LAST_NAMES = (
    "Arkwright Ashdown Bellweather Brill Castellan Cordwain Dunmore Eastlake Farrow Grimsby Hallam Ironside "
    "Jessop Kettering Lockwood Marchbank Northcote Ormond Pemberley Quayle Rackham Silvers Thornbury "
    "Whitlock"
).split()
ADJECTIVES = (
    "amber ancient bitter brave bright broken burning clever copper crooked damp distant dusty eastern "
    "floating foreign frozen gentle gilded heavy hidden hollow hungry ivory marble modern narrow nimble "
    "northern painted pale polished quiet rusty salty scarlet silver sleepy slender southern sunken upper "
    "velvet violet wooden"
).split()
NOUNS = (
    "anchor barrel basket beacon bell bridge bucket button cabin candle canyon carpet castle chapel chimney "
    "clock compass cottage cradle curtain dagger drum engine falcon feather ferry fiddle fountain furnace "
    "garden gate hammer harbour harvest helmet hinge island jacket kettle ladder lantern ledger lighthouse "
    "locket mantle meadow mill mirror monument mountain oar orchard organ oven paddle parlour pebble pillar "
    "pocket pony puppet quarry quilt raft ribbon saddle sail scarf shovel sparrow spindle stable statue "
    "stove tavern temple thimble throne tower trumpet tunnel turnip vessel violin wagon wallet walnut weaver "
    "wheel whistle willow window yard"
).split()
SYLLABLES = "ba bel cor dan dor el fan gar hal is jor kam lin lo mar mel nor ol pra quin ran sel tor ven wil"
PARTS = {  # what a character of a pattern stands for; any other stands for itself
    "F": FIRST_NAMES, "L": LAST_NAMES, "A": ADJECTIVES, "N": NOUNS, "C": [noun.title() for noun in NOUNS],
    "s": SYLLABLES.split(), "S": SYLLABLES.title().split(), "#": "0123456789", "1": "123456789",
    "%": "0123456789abcdef", "@": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "&": "abcdefghijklmnopqrstuvwxyz",
}  # fmt: skip
# A pattern that stands here twice is drawn twice as often.
IDENTIFIER = "%%%%%%%%-%%%%-%%%%-%%%%-%%%%%%%%%%%%"
KEYS = 2 * ("F L", "F L", "the A N", "A-N", "C") + ("Ss", "Sss", "@@-##", "@@-###", IDENTIFIER)
VALUES = 2 * ("1##", "1###", "1####", "1#####", "1######") + ("@@-###", "%%%%%%%%", IDENTIFIER)
WORD_VALUES = ("N", "N", "A N")
CHAIN_NAMES = ("@@@", "@@@@@", "@@@@@", "&&&", "&&&&&", "Ss", "Sss")
