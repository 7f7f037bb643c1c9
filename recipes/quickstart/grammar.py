"""Generate the quickstart's corpus: English-German sentence pairs from a small grammar.

A translator has to learn the following phenomena, which `Pair.tags` marks:

    agreement   articles and adjectives agree in gender, case and number; verbs agree in number
    final       the verb stands at the end of a subordinate clause
    separable   "invites" -> "lädt ... ein", but "weil er ... einlädt"
    bracket     modal, future and perfect push the other verb to the end
    inversion   a time adverb in front swaps subject and verb
    compound    "city house" -> "Stadthaus"
    number      "twenty-one" -> "einundzwanzig"; digits and names are copied
    choice      an English word has two German ones: know (wissen, kennen), place (stellen, legen)

Some combinations (an adjective with a noun, a verb with its object, a number) never occur in train,
valid and test. Each sentence of `test_comp` needs at least one of them.

    python grammar.py --out corpus --train 6000 --valid 500 --test 500
"""

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

NOM, ACC, DAT = range(3)


@dataclass(frozen=True)
class Noun:
    en: str
    en_plural: str
    gender: str
    de: str
    de_plural: str
    kind: str  # a: living being, s: thing that stands, l: thing that lies, p: place, f: furniture


@dataclass(frozen=True)
class Verb:
    en: str
    en_third: str
    en_past: str
    infinitive: str
    third: str
    plural: str
    participle: str
    prefix: str
    objects: str  # kinds of nouns that it takes as its object


def _table(cls, text: str) -> list:
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    return [cls(*row) for row in rows]


NOUNS = _table(
    Noun,
    """
    dog | dogs | m | Hund | Hunde | a
    cat | cats | f | Katze | Katzen | a
    child | children | n | Kind | Kinder | a
    teacher | teachers | m | Lehrer | Lehrer | a
    woman | women | f | Frau | Frauen | a
    girl | girls | n | Mädchen | Mädchen | a
    uncle | uncles | m | Onkel | Onkel | a
    doctor | doctors | f | Ärztin | Ärztinnen | a
    bird | birds | m | Vogel | Vögel | a
    horse | horses | n | Pferd | Pferde | a
    aunt | aunts | f | Tante | Tanten | a
    baker | bakers | m | Bäcker | Bäcker | a
    queen | queens | f | Königin | Königinnen | a
    sheep | sheep | n | Schaf | Schafe | a
    guest | guests | m | Gast | Gäste | a
    book | books | n | Buch | Bücher | l
    letter | letters | m | Brief | Briefe | l
    newspaper | newspapers | f | Zeitung | Zeitungen | l
    key | keys | m | Schlüssel | Schlüssel | l
    picture | pictures | n | Bild | Bilder | l
    shirt | shirts | n | Hemd | Hemden | l
    spoon | spoons | m | Löffel | Löffel | l
    lamp | lamps | f | Lampe | Lampen | s
    chair | chairs | m | Stuhl | Stühle | s
    bottle | bottles | f | Flasche | Flaschen | s
    bicycle | bicycles | n | Fahrrad | Fahrräder | s
    glass | glasses | n | Glas | Gläser | s
    clock | clocks | f | Uhr | Uhren | s
    cupboard | cupboards | m | Schrank | Schränke | s
    radio | radios | n | Radio | Radios | s
    house | houses | n | Haus | Häuser | p
    bridge | bridges | f | Brücke | Brücken | p
    garden | gardens | m | Garten | Gärten | p
    school | schools | f | Schule | Schulen | p
    village | villages | n | Dorf | Dörfer | p
    church | churches | f | Kirche | Kirchen | p
    station | stations | m | Bahnhof | Bahnhöfe | p
    shop | shops | m | Laden | Läden | p
    """,
)
VERBS = _table(
    Verb,
    """
    see | sees | saw | sehen | sieht | sehen | gesehen | | aslp
    buy | buys | bought | kaufen | kauft | kaufen | gekauft | | slp
    sell | sells | sold | verkaufen | verkauft | verkaufen | verkauft | | slp
    draw | draws | drew | zeichnen | zeichnet | zeichnen | gezeichnet | | aslp
    find | finds | found | finden | findet | finden | gefunden | | aslp
    carry | carries | carried | tragen | trägt | tragen | getragen | | sl
    repair | repairs | repaired | reparieren | repariert | reparieren | repariert | | s
    clean | cleans | cleaned | putzen | putzt | putzen | geputzt | | sp
    describe | describes | described | beschreiben | beschreibt | beschreiben | beschrieben | | aslp
    need | needs | needed | brauchen | braucht | brauchen | gebraucht | | sl
    love | loves | loved | lieben | liebt | lieben | geliebt | | ap
    know | knows | knew | kennen | kennt | kennen | gekannt | | ap
    invite | invites | invited | einladen | lädt | laden | eingeladen | ein | a
    call | calls | called | anrufen | ruft | rufen | angerufen | an | a
    bring back | brings back | brought back | zurückbringen | bringt | bringen | zurückgebracht | zurück | sl
    look at | looks at | looked at | anschauen | schaut | schauen | angeschaut | an | aslp
    throw away | throws away | threw away | wegwerfen | wirft | werfen | weggeworfen | weg | sl
    """,
)
STAND = Verb("place", "places", "placed", "stellen", "stellt", "stellen", "gestellt", "", "s")
LIE = Verb("place", "places", "placed", "legen", "legt", "legen", "gelegt", "", "l")
FURNITURE = _table(
    Noun,
    """
    table | tables | m | Tisch | Tische | f
    shelf | shelves | n | Regal | Regale | f
    bench | benches | f | Bank | Bänke | f
    """,
)
ADJECTIVES = [
    *(("old", "alt"), ("new", "neu"), ("small", "klein"), ("big", "groß"), ("red", "rot")),
    *(("green", "grün"), ("beautiful", "schön"), ("heavy", "schwer"), ("young", "jung")),
    *(("cheap", "billig"), ("famous", "berühmt"), ("strange", "seltsam"), ("clean", "sauber")),
]
HEADS = [
    *(("city", "Stadt"), ("garden", "Garten"), ("winter", "Winter"), ("summer", "Sommer")),
    *(("stone", "Stein"), ("museum", "Museums"), ("night", "Nacht"), ("kitchen", "Küchen")),
]
NAMES = ["Anna", "Tom", "Lena", "Paul", "Mira", "Jonas", "Clara", "Felix", "Nora", "Emil"]
PRONOUNS = [("he", "er", 0), ("she", "sie", 0), ("they", "sie", 1)]
PLACES = [("in", "in"), ("behind", "hinter"), ("next to", "neben"), ("in front of", "vor")]
COMPANY = [("with", "mit", DAT), ("without", "ohne", ACC), ("for", "für", ACC)]
TIMES = [
    *(("today", "heute"), ("in the morning", "am Morgen"), ("every day", "jeden Tag")),
    *(("on Monday", "am Montag"), ("in the evening", "am Abend"), ("now", "jetzt")),
]
MODALS = [
    ("can", "can", "kann", "können"),
    ("must", "must", "muss", "müssen"),
    ("wants to", "want to", "will", "wollen"),
    ("should", "should", "soll", "sollen"),
]
CONJUNCTIONS = [("because", "weil"), ("although", "obwohl"), ("when", "wenn"), ("before", "bevor")]
SAYING = [
    ("says that", "say that", "sagt, dass", "sagen, dass"),
    ("knows that", "know that", "weiß, dass", "wissen, dass"),
    ("believes that", "believe that", "glaubt, dass", "glauben, dass"),
]

# article and adjective ending by kind of article; a triple is nominative, accusative, dative
_ARTICLES = {
    "the": {
        "m": (("der", "e"), ("den", "en"), ("dem", "en")),
        "f": (("die", "e"), ("die", "e"), ("der", "en")),
        "n": (("das", "e"), ("das", "e"), ("dem", "en")),
        "pl": (("die", "en"), ("die", "en"), ("den", "en")),
    },
    "a": {
        "m": (("ein", "er"), ("einen", "en"), ("einem", "en")),
        "f": (("eine", "e"), ("eine", "e"), ("einer", "en")),
        "n": (("ein", "es"), ("ein", "es"), ("einem", "en")),
    },
    "no": {
        "m": (("kein", "er"), ("keinen", "en"), ("keinem", "en")),
        "f": (("keine", "e"), ("keine", "e"), ("keiner", "en")),
        "n": (("kein", "es"), ("kein", "es"), ("keinem", "en")),
        "pl": (("keine", "en"), ("keine", "en"), ("keinen", "en")),
    },
}
_COUNTED = ("e", "e", "en")

_ONES_EN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_ONES_DE = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
).split()
_TENS_EN = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_TENS_DE = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def number_words(n: int) -> tuple[str, str]:
    """Write 2 to 99 in English and German words: 21 -> twenty-one, einundzwanzig."""
    if n < 20:
        return _ONES_EN[n], _ONES_DE[n]
    tens, ones = divmod(n, 10)
    if ones == 0:
        return _TENS_EN[tens], _TENS_DE[tens]
    first = "ein" if ones == 1 else _ONES_DE[ones]
    return f"{_TENS_EN[tens]}-{_ONES_EN[ones]}", f"{first}und{_TENS_DE[tens]}"


@dataclass
class Phrase:
    """A piece of a sentence in both languages."""

    en: str
    de: str
    plural: bool = False
    noun: Noun | None = None


@dataclass(frozen=True)
class Pair:
    """A sentence in both languages. If it is `held_out`, it needs a combination not trained on."""

    en: str
    de: str
    tags: tuple[str, ...]
    held_out: bool

    def __getitem__(self, side: int) -> str:
        return (self.en, self.de)[side]


@dataclass
class Clause:
    """A clause in English and in the three German word orders."""

    en: str
    main: str
    subordinate: str
    inverted: str


@dataclass
class Speaker:
    """Draws sentences. `tags` and `held_out` describe the sentence that is being drawn."""

    random: random.Random
    tags: set = field(default_factory=set)
    held_out: bool = False

    def one(self, items):
        return items[self.random.randrange(len(items))]

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    # -- noun phrases

    def noun_phrase(self, case: int, kinds: str, pool=NOUNS) -> Phrase:
        noun = self.one([n for n in pool if n.kind in kinds])
        adjective = self.one(ADJECTIVES) if self.chance(0.45) else None
        article = self.random.choices(("the", "a", "no", "number"), (0.5, 0.27, 0.08, 0.15))[0]
        plural = article == "number" or (article != "a" and self.chance(0.3))
        en, de = (noun.en_plural, noun.de_plural) if plural else (noun.en, noun.de)
        if plural and case == DAT and de[-1] not in "ns":
            de += "n"
        if noun.kind in "sp" and self.chance(0.2):
            head = self.one(HEADS)
            en, de = f"{head[0]} {en}", head[1] + de.lower()
            self.tags.add("compound")
        if adjective:
            self.tags.add("agreement")
            if (ADJECTIVES.index(adjective) * 5 + pool.index(noun)) % 11 == 0:
                self.held_out = True
        if article == "number":
            en_article, de_article = self.number()
            ending = _COUNTED[case]
        else:
            row = _ARTICLES[article]["pl" if plural else noun.gender]
            de_article, ending = row[case]
            first = adjective[0] if adjective else en
            en_article = "an" if article == "a" and first[0] in "aeio" else article
        en = " ".join(filter(None, (en_article, adjective and adjective[0], en)))
        de = " ".join(filter(None, (de_article, adjective and adjective[1] + ending, de)))
        return Phrase(en, de, plural, noun)

    def number(self) -> tuple[str, str]:
        if self.chance(0.15):
            digits = str(self.random.randint(100, 9999))
            return digits, digits
        self.tags.add("number")
        n = self.random.randint(2, 99)
        if n > 20 and n % 9 == 4:
            self.held_out = True
        return number_words(n)

    def subject(self) -> Phrase:
        k = self.random.random()
        if k < 0.12:
            name = self.one(NAMES)
            return Phrase(name, name)
        if k < 0.22:
            return Phrase(*self.one(PRONOUNS))
        return self.noun_phrase(NOM, "a")

    def place(self) -> Phrase:
        if self.chance(0.6):
            en, de = self.one(PLACES)
            where = self.noun_phrase(DAT, "p")
        else:
            en, de, case = self.one(COMPANY)
            where = self.noun_phrase(case, "a")
        return Phrase(f"{en} {where.en}", f"{de} {where.de}")

    # -- clauses

    def predicate(self) -> tuple[Verb, Phrase, Phrase | None]:
        """Draw a verb, its object and, in some cases, a place or goal."""
        if self.chance(0.08):
            self.tags.add("choice")
            thing = self.noun_phrase(ACC, "sl")
            goal = self.noun_phrase(ACC, "f", FURNITURE)
            verb = STAND if thing.noun.kind == "s" else LIE
            return verb, thing, Phrase(f"on {goal.en}", f"auf {goal.de}")
        verb = self.one(VERBS)
        thing = self.noun_phrase(ACC, verb.objects)
        if (VERBS.index(verb) * 3 + NOUNS.index(thing.noun)) % 13 == 0:
            self.held_out = True
        if verb.en == "know":
            self.tags.add("choice")
        return verb, thing, self.place() if self.chance(0.3) else None

    def clause(self, tense: str | None = None) -> Clause:
        who = self.subject()
        verb, thing, where = self.predicate()
        when = Phrase(*self.one(TIMES)) if self.chance(0.3) else None
        tense = (
            tense
            or self.random.choices(("present", "past", "modal", "future"), (0.4, 0.2, 0.2, 0.2))[0]
        )
        if tense == "present":
            en_verb = verb.en if who.plural else verb.en_third
            finite, tail = verb.plural if who.plural else verb.third, verb.prefix
            final = tail + finite
            if verb.prefix:
                self.tags.add("separable")
        else:
            self.tags.add("bracket")
            if tense == "past":
                en_verb, tail = verb.en_past, verb.participle
                finite = "haben" if who.plural else "hat"
            elif tense == "future":
                en_verb, tail = f"will {verb.en}", verb.infinitive
                finite = "werden" if who.plural else "wird"
            else:
                singular, plural, de_singular, de_plural = self.one(MODALS)
                en_verb, tail = f"{plural if who.plural else singular} {verb.en}", verb.infinitive
                finite = de_plural if who.plural else de_singular
            final = f"{tail} {finite}"

        def join(*parts: str | None) -> str:
            return " ".join(filter(None, parts))

        middle = join(thing.de, where and where.de)
        time_en, time_de = (when.en, when.de) if when else (None, None)
        plain = join(who.de, finite, middle, tail)
        if when:
            self.tags.add("inversion")
            plain = join(time_de, finite, who.de, middle, tail)
        return Clause(
            en=join(who.en, en_verb, thing.en, where and where.en, time_en),
            main=plain,
            subordinate=join(who.de, time_de, middle, final),
            inverted=join(finite, who.de, time_de, middle, tail),
        )

    # -- sentences

    def sentence(self, nesting: float = 0.0) -> Pair:
        """Draw a sentence; `nesting` is the probability of a further subordinate clause."""
        self.tags, self.held_out = set(), False
        k = self.random.random()
        if k < 0.5:
            clause = self.clause()
            en, de, end = clause.en, clause.main, "."
        elif k < 0.68:
            en, de, end = *self.compound_sentence(), "."
        elif k < 0.84:
            who, (third, plural, de_third, de_plural) = self.subject(), self.one(SAYING)
            clause = self.clause()
            self.tags.add("final")
            if third.startswith("knows"):
                self.tags.add("choice")
            en = f"{who.en} {plural if who.plural else third} {clause.en}"
            de = f"{who.de} {de_plural if who.plural else de_third} {clause.subordinate}"
            end = "."
        elif k < 0.92:
            clause = self.clause("future")
            subject, rest = clause.en.split(" will ", 1)
            en, de, end = f"will {subject} {rest}", clause.inverted, "?"
        else:
            who, where, (en_adjective, de_adjective) = (
                self.noun_phrase(NOM, "aslp"),
                self.place(),
                self.one(ADJECTIVES),
            )
            en = f"{who.en} {where.en} {'are' if who.plural else 'is'} {en_adjective}"
            de = f"{who.de} {where.de} {'sind' if who.plural else 'ist'} {de_adjective}"
            end = "."
        if end == "." and self.chance(nesting):
            conjunction, clause = self.one(CONJUNCTIONS), self.clause()
            self.tags.add("final")
            en += f" {conjunction[0]} {clause.en}"
            de += f", {conjunction[1]} {clause.subordinate}"
        upper = lambda s: s[0].upper() + s[1:] + end
        return Pair(upper(en), upper(de), tuple(sorted(self.tags)), self.held_out)

    def compound_sentence(self) -> tuple[str, str]:
        self.tags.add("final")
        first, second, (en, de) = self.clause(), self.clause(), self.one(CONJUNCTIONS)
        if self.chance(0.5):
            return f"{first.en} {en} {second.en}", f"{first.main}, {de} {second.subordinate}"
        return f"{en} {second.en}, {first.en}", f"{de} {second.subordinate}, {first.inverted}"


def corpus(*, train: int, valid: int, test: int, seed: int = 1) -> dict[str, list[Pair]]:
    """Draw four splits that share no English sentence: train, valid, test, test_comp.

    Args:
        train, valid, test: number of pairs; `test_comp` has as many as `test`.
        seed: the same seed gives the same corpus on every machine.
    """
    speaker = Speaker(random.Random(seed))
    seen: set[str] = set()
    splits: dict[str, list[Pair]] = {"test": [], "valid": [], "train": [], "test_comp": []}
    sizes = {"test": test, "valid": valid, "train": train, "test_comp": test}
    for split, size in sizes.items():
        unseen = split == "test_comp"
        while len(splits[split]) < size:
            pair = speaker.sentence(nesting=0.3 if unseen else 0.0)
            if pair.held_out == unseen and pair.en not in seen:
                seen.add(pair.en)
                splits[split].append(pair)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--valid", type=int, default=500)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, pairs in corpus(
        train=args.train, valid=args.valid, test=args.test, seed=args.seed
    ).items():
        for side, lang in ((0, "en"), (1, "de")):
            text = "".join(p[side] + "\n" for p in pairs)
            (args.out / f"{split}.{lang}").write_text(text, encoding="utf-8")
        tags = "".join(json.dumps(p.tags) + "\n" for p in pairs)
        (args.out / f"{split}.tags").write_text(tags, encoding="utf-8")
        print(f"{split}: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
