"""The data of the built-in demonstration: triage notes of five hospitals that do not exist.

A seeded generator puts every note together from the word lists below. No note comes from a patient, a record or a
corpus, and findings, histories and labels are combined by chance: the data have **no medical meaning**, and a model
trained on them must never be used on people. They show federated training under differential privacy within minutes,
and they have what makes it hard:

- *sizes*: the largest hospital holds five times the notes of the smallest;
- *style*: each writes in its own register (abbreviations, clinical prose, the patient's words), spelling and phrases;
- *label skew*: each sees mostly three or four classes and almost lacks others;
- *case mix*: a third of the findings of a class is rarer at one hospital, another third at its neighbour;
- *ambiguity*: many findings belong to several classes, and notes mention denied findings, earlier illnesses of other
  classes and circumstances that say nothing;
- *label noise*: in all three splits the recorded label is, with chance ``LABEL_NOISE``, one of the other classes, so
  that no model can be expected to pass about 94 % on the test split.

Validation and test are the coordinator's: equally many notes from each hospital, with that hospital's own mix of
classes. No text occurs twice, within a split or across splits.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.errors import OutputError

LABELS: tuple[str, ...] = (
    "cardiac", "respiratory", "gastrointestinal", "neurological", "musculoskeletal", "infection", "mental health",
)  # fmt: skip
LABEL_NOISE = 0.06
VALIDATION_NOTES_PER_HOSPITAL = 60
TEST_NOTES_PER_HOSPITAL = 120
COLUMNS = ("text", "label", "hospital")

# Chances that set the difficulty: a linear classifier on frozen MiniLM features should reach 85 to 90 % of the test
# notes with all hospitals' notes, and clearly less with any one hospital's.
_SECOND_FINDING = 0.9
_SECOND_IS_SPECIFIC = 0.5
_RARE_FINDING_KEPT = 0.6
_HISTORY = 0.45
_HISTORY_OF_SAME_CLASS = 0.6
_DENIAL = 0.25
_CIRCUMSTANCE = 0.6
_CLOSING = 0.35

_Item = TypeVar("_Item")

# Classes by initial (c r g n m i h, as in LABELS), then three forms: abbreviated | clinical | the patient's words.
# A finding of several classes is ambiguous. American spelling; _BRITISH translates.
_FINDINGS = """
c: CP rad L arm | substernal chest pain radiating to the left arm | chest pain running down the left arm
c: irreg palps | palpitations with an irregular pulse | a fluttering heart that skips beats
c: orthopnea, ankle edema | orthopnea and bilateral ankle edema | swollen ankles and needing three pillows to sleep
c: AF w fast rate | atrial fibrillation with a rapid ventricular rate | a heart racing out of rhythm
c: ST dep on ECG | ST depression on the electrocardiogram | an abnormal heart tracing
c: exertional angina | exertional angina relieved by rest | chest tightness on the stairs that eases with rest
c: HR 38, presyncope | bradycardia with near syncope | a very slow pulse and nearly fainting
c: ICD shock x1 | a single defibrillator discharge | a jolt from the implanted heart device
r: wheeze, inhaler x6 | diffuse expiratory wheeze despite bronchodilators | wheezing that the puffer does not help
r: sats 86% RA | hypoxemia on room air | low oxygen on the finger clip
r: pleuritic pain, RR 30 | pleuritic pain with tachypnea | a stab under the ribs with each breath
r: hemoptysis | hemoptysis | coughing up streaks of blood
r: stridor | inspiratory stridor | a noisy, whistling throat when breathing in
r: croupy cough | a barking cough | a cough like a seal
r: smoke inhal | smoke inhalation | breathing in smoke from a kitchen fire
r: thick sputum, bronchiectasis | copious sputum with bronchiectasis | bringing up lots of phlegm from weak lungs
g: epigastric pain p food | postprandial epigastric pain | burning pain in the upper belly after meals
g: D x8/day | profuse watery diarrhea | runny stools many times a day
g: RIF pain, guarding | right lower quadrant pain with guarding | belly pain that moved to the lower right side
g: hematemesis | hematemesis | throwing up blood
g: PR bleed | rectal bleeding | bright blood in the toilet bowl
g: dysphagia solids | progressive dysphagia for solids | food sticking on the way down
g: GERD, reflux | gastroesophageal reflux | heartburn and sour fluid in the mouth
g: flare of UC | a flare of ulcerative colitis | cramps and mucus from a bad colon
n: R facial droop | right facial droop with dysarthria | a drooping face and slurred words
n: TCS x1, postictal | a generalized seizure followed by drowsiness | a fit with shaking all over
n: thunderclap HA | a thunderclap headache | the worst headache ever, out of nowhere
n: L hemiparesis | left hemiparesis | the left arm and leg going dead
n: aura + photophobia | migraine with visual aura and photophobia | zigzag lights and then a pounding head
n: diplopia, ptosis | diplopia and ptosis | seeing double with one drooping eyelid
n: vertigo, nystagmus | vertigo with nystagmus | the room spinning when turning over
n: ataxic gait | an ataxic gait | walking like a drunk without a drink
m: FOOSH, wrist deformed | a displaced wrist fracture after a fall | a bent wrist after landing on the hand
m: clavicle snapped, bike | a clavicle fracture off a bicycle | coming off a bike onto the collarbone
m: finger jammed, door | a crush injury of a fingertip | a finger caught in the car door
m: hot swollen knee, gout | acute gouty arthritis of the knee | a big toe joint too sore for the bedsheet
m: #NOF, leg short + ER | a shortened, externally rotated leg after a fall | a broken hip after slipping in the bath
m: torn calf, Thompson + | a ruptured Achilles tendon | a snap at the back of the heel while running
m: rib tender p fall | localized rib tenderness after a fall | sore ribs after falling off a ladder
m: POP too tight | a constricting plaster cast | a plaster cast that pinches
i: tick bite, ring rash | erythema migrans after a tick bite | a red ring around a tick bite
i: rigors, T 39.6 | rigors with high fever | shaking chills and burning up
i: dysuria, freq | dysuria with urinary frequency | stinging when passing water
i: scabies | scabies of the finger webs | a maddening itch at night, the partner too
i: mumps contact, parotid up | parotid swelling after contact with mumps | hamster cheeks like the nephew had
i: neck stiff + petechiae | meningism with a petechial rash | a rash that stays under a glass and a stiff neck
i: shingles T6 | herpes zoster in a thoracic dermatome | a band of painful blisters
i: otitis, discharge | otitis media with discharge | an ear oozing yellow fluid
h: panic attack | a panic attack with fear of dying | sudden terror and thinking of dying
h: SI, no plan | passive suicidal ideation | not seeing the point of living
h: hearing voices | auditory hallucinations | voices that nobody else hears
h: manic, no sleep | pressured speech and grandiosity | talking nonstop, spending money and full of plans
h: EtOH withdrawal | alcohol withdrawal with agitation | the shakes after stopping drink
h: paranoid ideas | persecutory delusions | being sure the neighbors are spying
h: restricting food, BMI 15 | restrictive eating with fear of weight gain | hardly eating for fear of gaining weight
h: tearful, can't cope | tearfulness and hopelessness | crying all day and unable to cope
crih: SOB | dyspnea | being short of breath; crgmh: chest tightness | a tight chest | a tight feeling in the chest
cnih: dizzy | lightheadedness | feeling dizzy; crgnmih: TATT | fatigue | being tired all the time
rgi: T 38.2 | pyrexia | a temperature; nimh: HA | headache | a headache
gnmi: back pain | back pain | an aching back; cgni: N+V | nausea and vomiting | feeling sick and vomiting
cih: sweaty | diaphoresis | sweating a lot
nmh: tingling hands | paresthesia of the hands | pins and needles in the hands
rmh: poor sleep | insomnia | hardly sleeping; ch: palps | palpitations | a pounding heart
gim: abdo pain | abdominal pain | stomach ache; nmi: weak legs | weakness of the legs | weak legs
gih: off food | anorexia | no appetite; nih: confused | acute confusion | being muddled
cri: cough | a persistent cough | a cough that will not go; nmi: stiff neck | neck stiffness | a stiff neck
cmi: leg swelling | unilateral leg swelling | a swollen leg
cgm: pain L chest wall | left-sided thoracic discomfort | an ache on the left side
"""

_HISTORIES = """
c: HTN | hypertension | high blood pressure; c: CABG | bypass surgery | a heart bypass
r: asthma | asthma | asthma; r: COPD | emphysema | smoker's lungs
g: IBS | irritable bowel syndrome | a touchy gut; g: PUD | peptic ulcer disease | a stomach ulcer
n: CVA | an earlier stroke | a stroke; n: MS | multiple sclerosis | multiple sclerosis
m: OA | osteoarthritis | worn joints; m: TKR | knee replacement | a new knee
i: rec UTI | recurrent urinary infections | bladder infections; i: MRSA | MRSA carriage | a hospital germ
h: GAD | generalized anxiety | bad nerves; h: BPAD | bipolar disorder | bipolar illness
"""

_CIRCUMSTANCES = """
: lives alone | lives alone | lives alone with a cat; : NKDA | no known drug allergies | no allergies
: smoker 10/d | smokes ten cigarettes a day | smokes a pack every two days
: BIBA | arrived by ambulance | came in by ambulance
: w daughter | accompanied by a daughter | the daughter is here too
: interp used | interpreter present | the neighbor translated
: needs sick note | requests a note for the employer | needs a note for work
: took APAP | took acetaminophen without relief | took acetaminophen, no help
: fit + well | previously well | healthy until now; : works nights | works night shifts | works nights at the bakery
: seen by PCP | referred by primary care | sent over by the family doctor
: vax UTD | vaccinations up to date | had all the shots; : no EtOH | does not drink alcohol | never drinks
"""

_BRITISH = {
    "edema": "oedema", "pnea": "pnoea", "hemat": "haemat", "hemo": "haemo", "hypoxem": "hypoxaem", "PCP": "GP",
    "diarrhea": "diarrhoea", "GERD": "GORD", "gastroeso": "gastro-oeso", "paresth": "paraesth", "alized": "alised",
    "neighbor": "neighbour", "acetaminophen": "paracetamol", "APAP": "paracetamol", "family doctor": "practice",
}  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class _Hospital:
    """What one hospital sees and how it writes: ``{who}`` the patient, ``{a}`` findings, ``{t}`` the duration."""

    name: str
    train_notes: int
    mix: tuple[int, ...]  # percentage of each class, in the order of LABELS
    registers: tuple[int, ...]  # which forms of a finding: 0 abbreviated, 1 clinical, 2 the patient's words
    british: bool
    width: int  # characters of a note: keeps it within 48 MiniLM tokens, of which abbreviations cost the most
    who: tuple[str, ...]
    joins: tuple[str, ...]
    durations: tuple[str, ...]
    openings: tuple[str, ...]
    histories: tuple[str, ...]
    denials: tuple[str, ...]
    closings: tuple[str, ...]


# fmt: off
_HOSPITALS = (
    _Hospital(
        name="north-quay", train_notes=620, mix=(26, 24, 20, 14, 8, 4, 4), registers=(0,), british=True, width=88,
        who=("{age}{sex}", "{age}yo {sex}", "{sex} {age}"), joins=(" + ", ", ", " & "),
        durations=("{n}/7", "{n}/52", "{n}/24", "since dawn"),
        openings=("{who} c/o {a} {t}.", "{who}: {a}, {t}.", "PC {a} {t}. {who}.", "{t} hx {a}, {who}."),
        histories=("PMH {a}.", "Bg {a}.", "PMHx: {a}."), denials=("No {a}.", "Nil {a}.", "Neg {a}."),
        closings=("Obs stable.", "EWS 2.", "D/w reg.", "For bloods.", "Cat 3."),
    ),
    _Hospital(
        name="lantern-university", train_notes=480, mix=(17, 4, 10, 27, 4, 14, 24), registers=(1,),
        british=False, width=144,
        who=("{age}-year-old {person}", "{person} of {age}", "{person} aged {age} years"),
        joins=(" and ", " together with ", " accompanied by "),
        durations=("for {n} days", "over the past {n} hours", "with onset {n} days ago", "for {n} weeks"),
        openings=("A {who} presents with {a} {t}.", "This {who} was transferred for {a} {t}.",
                  "Evaluation of a {who} reporting {a} {t}.", "The chief complaint of this {who} is {a} {t}.",
                  "Referral for {a} {t} in a {who}."),
        histories=("Medical history is notable for {a}.", "Past history includes {a}.", "Known {a}."),
        denials=("The patient denies {a}.", "There is no {a}.", "Negative for {a}."),
        closings=("Vital signs are stable.", "Resident notified.", "Workup initiated.", "Acuity level three."),
    ),
    _Hospital(
        name="copper-valley", train_notes=350, mix=(6, 20, 25, 4, 14, 27, 4), registers=(2,), british=False, width=160,
        who=("{age} year old {person}", "local {person} of {age}", "{person} ({age})"),
        joins=(" and also ", ", plus ", " along with "),
        durations=("since {day}", "for about {n} days", "since last night", "for {n} weeks now"),
        openings=("{who} walked in with {a} {t}.", "{who} tells us about {a} {t}.", "Troubled by {a} {t}: {who}.",
                  "Mainly here for {a} {t}, {who}.", "{who} worried about {a} {t}."),
        histories=("Has had {a} before.", "Told us about {a} years ago.", "Chart mentions {a}."),
        denials=("Says there is no {a}.", "Not bothered by {a}.", "No sign of {a}."),
        closings=("Sitting comfortably.", "Will wait in the lobby.", "Doctor told.", "Ice water given."),
    ),
    _Hospital(
        name="kestrel-trauma", train_notes=230, mix=(11, 6, 4, 19, 40, 4, 16), registers=(0, 0, 1),
        british=False, width=88,
        who=("{age} y/o {person}", "{person}, {age}y", "{age}{sex}"), joins=(" w/ ", " and ", "; "),
        durations=("x{n}d", "x {n} hrs", "onset {n}h PTA", "x{n}wk"),
        openings=("CC: {a} {t}. {who}.", "EMS: {who}, {a} {t}.", "Trauma bay: {who} {a} {t}.", "S: {a} {t}, {who}."),
        histories=("Hx: {a}.", "PMHx sig for {a}.", "H/o {a}."), denials=("(-) {a}.", "Denies {a}.", "Neg {a}."),
        closings=("ESI 3.", "GCS 15.", "IV x1 placed.", "Imaging ordered.", "VSS."),
    ),
    _Hospital(
        name="old-mill", train_notes=120, mix=(14, 8, 6, 4, 20, 19, 29), registers=(1, 2), british=True, width=150,
        who=("{age} year old {gentle}", "{gentle} of {age}", "{gentle} aged {age}"),
        joins=(" as well as ", " and ", ", with "),
        durations=("for {n} days", "these past {n} weeks", "since {day}", "of {n} days' standing"),
        openings=("Thank you for seeing this {who} with {a} {t}.", "May I send you a {who} who describes {a} {t}.",
                  "I would be grateful for your opinion on {a} {t} in this {who}.",
                  "This pleasant {who} attended surgery with {a} {t}.",
                  "The district nurse rang about {a} {t} in a {who}."),
        histories=("You may recall {a}.", "There is a background of {a}.", "On our register for {a}."),
        denials=("I could find no {a}.", "There has been no {a}.", "No mention of {a}."),
        closings=("Kind regards.", "Many thanks.", "The family is anxious.", "Medication list enclosed."),
    ),
)
# fmt: on
HOSPITALS: tuple[str, ...] = tuple(hospital.name for hospital in _HOSPITALS)


@dataclass(frozen=True)
class _Finding:
    labels: frozenset[str]
    forms: tuple[str, ...]  # by register


def _parse(lines: str) -> list[_Finding]:
    of_initial = dict(zip("crgnmih", LABELS, strict=True))
    split = [entry.split(":", 1) for entry in re.split("[;\n]", lines.strip())]
    return [
        _Finding(frozenset(of_initial[i] for i in initials.strip()), tuple(form.strip() for form in forms.split("|")))
        for initials, forms in split
    ]


def _by_label(findings: list[_Finding]) -> dict[str, list[_Finding]]:
    return {label: [finding for finding in findings if label in finding.labels] for label in LABELS}


_SPECIFIC = _by_label([finding for finding in _parse(_FINDINGS) if len(finding.labels) == 1])
_AMBIGUOUS = _by_label([finding for finding in _parse(_FINDINGS) if len(finding.labels) > 1])
_EARLIER = _by_label(_parse(_HISTORIES))
_NEUTRAL = _parse(_CIRCUMSTANCES)


class _Notes:
    """Writes one hospital's notes. All chance is drawn by ``random()``, whose sequence Python keeps across versions."""

    def __init__(self, hospital: _Hospital, seed: int) -> None:
        self._style = hospital
        self._index = HOSPITALS.index(hospital.name)
        self._random = random.Random(f"{seed}/{hospital.name}").random

    def labels(self, count: int) -> list[str]:
        """``count`` labels in the hospital's mix, largest remainders rounded up, in random order."""
        exact = [count * percent / 100 for percent in self._style.mix]
        counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(LABELS)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: count - sum(counts)]:
            counts[i] += 1
        return _shuffled([label for label, n in zip(LABELS, counts, strict=True) for _ in range(n)], self._random)

    def recorded(self, label: str) -> str:
        """The label after noise; draws as often with noise as without, so that the texts do not depend on it."""
        wrong = self._pick(_others(label))
        return wrong if self._chance(LABEL_NOISE) else label

    def text(self, label: str) -> str:
        """One note on a patient of this class: an opening sentence and as many of the others as fit."""
        sentences = [self._opening(label)]
        for sentence in _shuffled(self._further_sentences(label), self._random):
            if len(" ".join([*sentences, sentence])) <= self._style.width:
                sentences.append(sentence)
        # The ages 18 and 80 to 89 want "an".
        return re.sub(r"\b([Aa]) (?=8\d|18)", r"\1n ", " ".join(s[0].upper() + s[1:] for s in sentences))

    def _opening(self, label: str) -> str:
        style = self._style
        template = self._pick(style.openings)
        duration = self._pick(style.durations).format(n=2 + int(self._random() * 8), day=self._pick(_DAYS))
        who = self._who()
        first = self._specific(label)
        second = self._specific(label) if self._chance(_SECOND_IS_SPECIFIC) else self._ambiguous(label)
        one = self._say(first)
        both = one + self._pick(style.joins) + self._say(second)
        opening = template.format(who=who, a=both, t=duration)
        if second is not first and self._chance(_SECOND_FINDING) and len(opening) <= style.width:
            return opening
        return template.format(who=who, a=one, t=duration)

    def _who(self) -> str:
        sex, person, gentle = self._pick((("M", "man", "gentleman"), ("F", "woman", "lady")))
        age = 18 + int(self._random() * 75)
        return self._pick(self._style.who).format(age=age, sex=sex, person=person, gentle=gentle)

    def _further_sentences(self, label: str) -> list[str]:
        sentences = []
        if self._chance(_HISTORY):
            of = label if self._chance(_HISTORY_OF_SAME_CLASS) else self._pick(_others(label))
            sentences.append(self._pick(self._style.histories).format(a=self._say(self._pick(_EARLIER[of]))))
        if self._chance(_DENIAL):
            denied = self._say(self._ambiguous(self._pick(_others(label)), but_not=label))
            sentences.append(self._pick(self._style.denials).format(a=re.sub("^an? ", "", denied)))
        if self._chance(_CIRCUMSTANCE):
            sentences.append(self._say(self._pick(_NEUTRAL)) + ".")
        if self._chance(_CLOSING):
            sentences.append(self._pick(self._style.closings))
        return sentences

    def _specific(self, label: str) -> _Finding:
        while True:
            i = int(self._random() * len(_SPECIFIC[label]))
            if (i + self._index) % 3 or self._chance(_RARE_FINDING_KEPT):
                return _SPECIFIC[label][i]

    def _ambiguous(self, label: str, but_not: str = "") -> _Finding:
        return self._pick([finding for finding in _AMBIGUOUS[label] if but_not not in finding.labels])

    def _say(self, finding: _Finding) -> str:
        said = finding.forms[self._pick(self._style.registers)]
        if self._style.british:
            for american, british in _BRITISH.items():
                said = said.replace(american, british)
        return said

    def _chance(self, probability: float) -> bool:
        return self._random() < probability

    def _pick(self, items: Sequence[_Item]) -> _Item:
        return items[int(self._random() * len(items))]


def _others(label: str) -> list[str]:
    return [other for other in LABELS if other != label]


def _shuffled(items: Sequence[_Item], uniform: Callable[[], float]) -> list[_Item]:
    """The items in random order (Fisher and Yates), from ``uniform`` alone."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = int(uniform() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


def write_demo_data(folder: Path, seed: int = 0) -> Path:
    """Write ``train.csv`` (1,800 notes), ``validation.csv`` (300) and ``test.csv`` (600); columns: ``COLUMNS``.

    The same seed gives the same bytes on every machine.

    Args:
        folder: created where it is missing; files of these names are replaced.
        seed: any integer; another seed gives other notes of the same kind.

    Returns:
        ``folder``.

    Raises:
        OutputError: the folder cannot be created or written.
    """
    splits: dict[str, list[tuple[str, str, str]]] = {"train": [], "validation": [], "test": []}
    written: set[str] = set()
    for hospital in _HOSPITALS:
        notes = _Notes(hospital, seed)
        sizes = (hospital.train_notes, VALIDATION_NOTES_PER_HOSPITAL, TEST_NOTES_PER_HOSPITAL)
        for rows, size in zip(splits.values(), sizes, strict=True):
            for label in notes.labels(size):
                while (text := notes.text(label)) in written:
                    pass
                written.add(text)
                rows.append((text, notes.recorded(label), hospital.name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            uniform = random.Random(f"{seed}/{split}").random
            with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *_shuffled(rows, uniform)])
    except OSError as error:
        raise OutputError(
            f"folder: the demonstration data cannot be written to {folder} ({error.strerror}); choose another folder"
        ) from error
    return folder
