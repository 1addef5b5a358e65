// Drafts from the texts of a batch on the host, two calls a round: copies (`copies.h`) and structure (`automaton.h`), and
// what each of them puts behind the other's drafts. `tests/drafting.py` says in Python what is found.
#include "automaton.h"
#include "copies.h"

// A round's candidates in Python's memory, `columns` for each of `count` requests: tokens, chances and names
// [count, columns, width], sizes and places of the first tokens [count, columns]. of: the columns of copies and of walks,
// NONE: there is none. widest: their most drafts. ahead: [count], rows that are under way, which are paid. first: the
// request that is asked about first.
struct Batch {
    int64_t count, columns, width, of[2], widest[2], first;
    double price;
    Copies* const* copies;
    Walk* const* walks;
    const int64_t* ahead;
    int32_t* tokens;
    double* alive;
    uint8_t* names;
    int64_t* sizes;
    int64_t* at;

    Drafts drafts(int64_t request, int64_t column) const {
        const int64_t place = request * columns + column;
        return {tokens + place * width, alive + place * width, names + place * width, width, sizes[place]};
    }
    int64_t& size(int64_t request, int64_t column) const { return sizes[request * columns + column]; }
};

namespace {

enum Arm { COPIES, WALKS };
constexpr Arm TURNS[] = {COPIES, WALKS, COPIES, WALKS};  // a grammar has the last word

// Continues a candidate in turns, as long as an arm has not seen what the other made of it. None goes on behind its own
// tokens.
void extend(const Batch& batch, int64_t request, int64_t column, int64_t room) {
    Drafts drafts = batch.drafts(request, column);
    Copies* copies = batch.copies[request];
    Walk* walk = batch.walks[request];
    const int64_t paid = column == batch.of[COPIES] || column == batch.of[WALKS] ? batch.ahead[request] : 0;
    int64_t last = column == batch.of[COPIES] ? COPIES : column == batch.of[WALKS] ? WALKS : NONE;
    int64_t version = 0, seen[] = {-1, -1};
    for (const Arm arm : TURNS) {
        if (arm == last || seen[arm] == version || (arm == COPIES ? !copies : !walk)) continue;
        const std::vector<int32_t> before(drafts.tokens, drafts.tokens + drafts.count);
        if (arm == COPIES) {
            copies->extend(drafts, std::min(room - drafts.count, batch.widest[COPIES]), batch.price, paid);
            version += drafts.count > int64_t(before.size());
        } else if (walk->name == GRAMMAR || room > drafts.count) {
            version += walk->go_on(drafts, room, batch.price, paid);
        }
        const auto most = before.begin() + std::min<int64_t>(int64_t(before.size()), drafts.count);
        if (drafts.count > std::mismatch(before.begin(), most, drafts.tokens).first - before.begin()) last = arm;
        seen[arm] = version;
    }
    static const std::vector<int32_t> none;  // in place of a temporary, for which all are copied
    const auto& stops = copies ? copies->stops : walk ? walk->stops : none;
    const auto end = std::find_first_of(drafts.tokens, drafts.tokens + drafts.count, stops.begin(), stops.end());
    batch.size(request, column) = std::min<int64_t>(drafts.count, end - drafts.tokens + 1);
}

// What is expected of verifying at most `most` drafts behind the first `ahead`: tokens of the round, and rows.
void forecast(const Drafts& drafts, int64_t most, int64_t ahead, double price, double* forecast) {
    const double least = drafts.least(ahead ? price : 0.0, ahead);
    double length = 0.0;
    int64_t rows = 1;
    for (int64_t at = ahead; at < std::min(drafts.count, ahead + most); ++at)
        if (drafts.alive[at] >= least) length += drafts.alive[at], ++rows;
    forecast[0] = 1 + length, forecast[1] = double(rows);
}

}  // namespace

extern "C" {

// Shows each request its next tokens, those of request i from `ends[i - 1]` to `ends[i]`, the first at position
// `starts[i]` of its text, and proposes. forecasts: [count, 2, 2], the length and rows of each copy and structure.
void whiflash_propose(
    const Batch* given, const int32_t* tokens, const int64_t* ends, const int64_t* starts, double* forecasts
) {
    const Batch& batch = *given;
    for (int64_t turn = 0; turn < batch.count; ++turn) {
        const int64_t i = (batch.first + turn) % batch.count, begin = i ? ends[i - 1] : 0, count = ends[i] - begin;
        Copies* copies = batch.copies[i];
        Walk* walk = batch.walks[i];
        const auto unread = [&](int64_t known) { return std::min(std::max<int64_t>(known - starts[i], 0), count); };
        if (copies) {
            const int64_t read = unread(copies->text.size);
            copies->commit(tokens + begin + read, count - read);
        }
        if (walk) {
            const int64_t read = unread(walk->known);
            walk->read(tokens + begin + read, count - read);
        }
        for (const Arm arm : {COPIES, WALKS}) {
            if (arm == COPIES ? !copies : !walk) continue;
            Drafts drafts = batch.drafts(i, batch.of[arm]);
            const int64_t most = std::min(batch.widest[arm] + batch.ahead[i], batch.width);
            if (arm == COPIES) copies->look(drafts, most, batch.price, batch.ahead[i]);
            else walk->go_on(drafts, most, batch.price, batch.ahead[i]);
            batch.size(i, batch.of[arm]) = drafts.count;
            batch.at[i * batch.columns + batch.of[arm]] = starts[i] + count;
            forecast(drafts, batch.widest[arm], batch.ahead[i], batch.price, forecasts + 2 * (2 * i + arm));
        }
    }
}

// modes: [count, columns], 0: a candidate may not be verified; 2: others may continue it; 3: so, and there is no device that
// makes copies of a request's own text itself, as in `whiflash lab replay`. rooms: most tokens.
void whiflash_extend(const Batch* batch, const uint8_t* modes, const int64_t* rooms) {
    for (int64_t turn = 0; turn < batch->count; ++turn) {
        const int64_t i = (batch->first + turn) % batch->count;
        for (int64_t column = 0; column < batch->columns; ++column) {
            const uint8_t mode = modes[i * batch->columns + column];
            int64_t& size = batch->size(i, column);
            if (mode >= 2 && size) extend(*batch, i, column, rooms[i]);
            const Drafts drafts = batch->drafts(i, column);
            const auto own = [](uint8_t name) { return name == CONTEXT; };
            const bool itself = mode < 3 && column == batch->of[COPIES] && std::all_of(drafts.names, drafts.names + size, own);
            if (!mode || itself) size = 0;
        }
    }
}

Text* whiflash_text() { return new Text; }
void whiflash_text_end(Text* text) { delete text; }
void whiflash_append(Text* text, const int32_t* tokens, int64_t count) { text->extend(tokens, count); }
int64_t whiflash_size(const Text* text) { return text->size; }
void whiflash_tokens(const Text* text, int32_t* tokens) {
    std::copy(text->tokens.begin(), text->tokens.end(), tokens);
}
int64_t whiflash_bytes(const Text* text) {
    return int64_t(sizeof(int32_t) * (text->tokens.capacity() + 4 * text->one_heads.capacity()));
}

// prompt: tokens that are followed before the answer's.
Prediction* whiflash_prediction(const int32_t* tokens, int64_t count, int64_t prompt) {
    auto* made = new Prediction{{}, std::vector<uint8_t>(size_t(count)), {}, prompt};
    made->text.extend(tokens, count);
    return made;
}
void whiflash_prediction_end(Prediction* prediction) { delete prediction; }
void whiflash_follow(Prediction* prediction, const int32_t* tokens, int64_t count) { prediction->follow(tokens, count); }
int64_t whiflash_accepted(const Prediction* prediction) { return prediction->accepted; }

// right, seen: chances of copies. habit: [2], how well the request copies. least: the shortest match.
Copies* whiflash_copies(
    double* right, double* seen, double* habit, int64_t least, const int32_t* stops, int64_t count
) {
    auto* made = new Copies;
    made->own = made->from = {&made->text, {right, seen}, habit, CONTEXT};
    made->least = least;
    made->stops.assign(stops, stops + count);
    return made;
}
void whiflash_copies_end(Copies* copies) { delete copies; }
void whiflash_predict(Copies* copies, Prediction* prediction, double* right, double* seen) {
    copies->prediction = prediction;
    copies->predicted = {&prediction->text, {right, seen}, nullptr, PREDICTION, prediction};
}
// Sets the texts of its group: `answer` is its own there, `others` ([count, 4]: text, right, seen and habit) are searched.
void whiflash_join(
    Copies* copies, Text* answer, int64_t prompt, double* taken, int64_t* looks, const int64_t* others, int64_t count
) {
    copies->answer = answer, copies->prompt = prompt, copies->taken = taken, copies->looks = looks;
    copies->others.clear();
    for (const int64_t* each = others; each < others + 4 * count; each += 4) {
        auto* rates = reinterpret_cast<double* const*>(each + 1);
        copies->others.push_back({reinterpret_cast<const Text*>(each[0]), {rates[0], rates[1]}, rates[2], GROUP});
    }
}
void whiflash_commit(Copies* copies, const int32_t* tokens, int64_t count) { copies->commit(tokens, count); }
// What it learns from next: how its places agree on each token of the last copy, and the length and place of its match.
int64_t whiflash_last(const Copies* copies, int32_t* agreements, int64_t* place) {
    std::copy(copies->agreements.begin(), copies->agreements.end(), agreements);
    place[0] = copies->matched, place[1] = copies->at;
    return int64_t(copies->copy.size());
}
const Text* whiflash_own(const Copies* copies) { return &copies->text; }

// begins: [size + 1], where each token's bytes begin. special: [size], whether a token is special.
Vocabulary* whiflash_vocabulary(const int64_t* begins, const char* bytes, const uint8_t* special, int64_t size) {
    auto* made = new Vocabulary{{begins, begins + size + 1}, {bytes, size_t(begins[size])}, {}};
    for (int64_t token = 0; token < size; ++token)
        made->kinds.push_back(special[token] ? 0 : kind_of(bytes + begins[token], size_t(begins[token + 1] - begins[token])));
    return made;
}
void whiflash_vocabulary_end(Vocabulary* vocabulary) { delete vocabulary; }

Lessons* whiflash_lessons(const Vocabulary* vocabulary) { return new Lessons{vocabulary, {}, {}}; }
void whiflash_lessons_end(Lessons* lessons) { delete lessons; }
// Forgets all cuts. right, seen: of each reason.
void whiflash_learn(Lessons* lessons, double* right, double* seen) {
    lessons->reasons = {right, seen};
    lessons->cuts.clear();
}
int64_t whiflash_cuts(const Lessons* lessons, int32_t* cuts) {  // [CUTS, 3]: before, usual, written
    for (const auto& [place, cut] : lessons->cuts)
        *cuts++ = int32_t(place >> 32), *cuts++ = int32_t(place), *cuts++ = cut.written;
    return int64_t(lessons->cuts.size());
}

// most: nodes and edges from which on it is full.
Automaton* whiflash_automaton(
    const Vocabulary* vocabulary, Lessons* lessons, decltype(Asked::edges) edges, decltype(Asked::step) step,
    decltype(Asked::uses) uses, decltype(Asked::restart) restart, int64_t most
) {
    auto* made = new Automaton;
    made->vocabulary = vocabulary, made->lessons = lessons, made->asked = {edges, step, uses, restart}, made->most = most;
    return made;
}
void whiflash_automaton_end(Automaton* automaton) { delete automaton; }
// Drops all nodes; words stay.
void whiflash_clear(Automaton* automaton) {
    automaton->nodes.clear(), automaton->stays.clear(), automaton->options.clear(), automaton->chosen.clear();
    automaton->edges.clear(), automaton->choices.clear();
}
int32_t whiflash_full(const Automaton* automaton) { return automaton->is_full(); }
int64_t whiflash_words(Automaton* automaton, const char* const* words, int64_t count) {
    automaton->words.emplace_back(words, words + count);
    std::sort(automaton->words.back().begin(), automaton->words.back().end());
    return int64_t(automaton->words.size()) - 1;
}

int32_t whiflash_node(Automaton* automaton) {
    automaton->nodes.emplace_back();
    return int32_t(automaton->nodes.size()) - 1;
}
void whiflash_stay(
    Automaton* automaton, int32_t node, const char* leaving, const char* ending, int32_t plain, int32_t words, int32_t to
) {
    const auto kind = uint8_t(plain ? Vocabulary::PLAIN : Vocabulary::WHOLE);
    automaton->nodes[node].stay = int32_t(automaton->stays.size());
    automaton->stays.push_back({Bytes(leaving), Bytes(ending), kind, words, to});
}
void whiflash_edge(Automaton* automaton, int32_t node, int32_t token, int32_t after) {
    automaton->edges[pair(node, token)] = after;
}
int32_t whiflash_after(Automaton* automaton, int32_t node, int32_t token) {
    return automaton->follow(node, &token, 1, NOBODY);
}
int32_t whiflash_asked(const Automaton* automaton, int32_t node) { return automaton->nodes[node].asked; }
// A node goes on with a token for these reasons; NONE: nothing is known to follow.
void whiflash_step(Automaton* automaton, int32_t node, int32_t token, uint32_t kinds) {
    Node& at = automaton->nodes[node];
    at.asked = Node::KNOWN, at.step = {token, kinds}, at.after = NONE;
}
// It goes on with it where a request has used these words as the asking one has.
void whiflash_choice(
    Automaton* automaton, int32_t node, const int32_t* words, int64_t count, int32_t token, uint32_t kinds
) {
    if (automaton->nodes[node].asked != Node::CHOICE) {
        automaton->options.emplace_back(words, words + count);
        automaton->nodes[node].options = int32_t(automaton->options.size()) - 1;
        automaton->nodes[node].asked = Node::CHOICE;
    }
    automaton->choices[pair(node, automaton->best_of(automaton->nodes[node].options))] = int32_t(automaton->chosen.size());
    automaton->chosen.push_back({token, kinds});
}
// Nodes, edges, choices; edges and steps that were asked of Python.
void whiflash_counts(const Automaton* automaton, int64_t* counts) {
    counts[0] = int64_t(automaton->nodes.size()), counts[1] = int64_t(automaton->edges.size());
    counts[2] = int64_t(automaton->chosen.size());
    counts[3] = automaton->edges_asked, counts[4] = automaton->steps_asked;
}

// last: the text's last token; known: how many it has. name: of its drafts.
Walk* whiflash_walk(
    Automaton* automaton, int32_t node, int32_t last, int64_t known, int32_t name, int32_t shared, const int32_t* stops,
    int64_t count
) {
    auto* made = new Walk;
    made->automaton = automaton, made->node = node, made->last = last, made->known = known;
    made->name = uint8_t(name), made->shared = shared;
    made->stops.assign(stops, stops + count);
    return made;
}
void whiflash_walk_end(Walk* walk) { delete walk; }
// Puts it at another node, of whichever automaton.
void whiflash_place(Walk* walk, Automaton* automaton, int32_t node) {
    if (walk->automaton != automaton) walk->used.clear();
    walk->automaton = automaton, walk->node = node;
}
int64_t whiflash_known(const Walk* walk) { return walk->known; }
int32_t whiflash_node_of(const Walk* walk) { return walk->node; }
// Takes the tokens that nobody has followed, and counts them as followed; null: returns how many they are.
int64_t whiflash_take(Walk* walk, int32_t* tokens) {
    const auto count = int64_t(walk->unfollowed.size());
    if (!tokens || !count) return count;
    std::copy(walk->unfollowed.begin(), walk->unfollowed.end(), tokens);
    walk->last = walk->unfollowed.back();
    walk->unfollowed.clear();
    return count;
}
// Follows tokens whose edges are known.
void whiflash_follow_known(Walk* walk, const int32_t* tokens, int64_t count) {
    walk->automaton->asking = walk;
    walk->commit(tokens, count, false, false);
}

}  // extern "C"
