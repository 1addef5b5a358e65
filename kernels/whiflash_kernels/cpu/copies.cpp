// Two searches for copies. `whiflash_copy`, on the host: in a request's own text, in answers of its group, and in the
// answer that its caller predicts; `tests/lookup/searched.py` says in Python what is found. `whiflash_propose`, for a
// batch: `propose_copies` of `whiflash_kernels.copies`, whose body is its specification.
//
// A `Text` is T tokens with, for each, the place before it with the same hash of its last token (`one_before`) or its
// last two (`two_before`), and the tables of the newest places (`..._heads`), `mask` + 1 entries each. Source: hash
// chains, as in LZ77. All other memory is the caller's.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace {

constexpr int64_t FIRST_HEADS = 256;
constexpr int CANDIDATES = 8, STEPS = 32, MATCH = 32, KINDS = 4, GAP = -1;
constexpr int NEAR = 64;    // places ahead of where an answer left its prediction that are all compared
constexpr int SETTLED = 3;  // tokens that an answer follows at a new place before the search begins there
constexpr int BUCKETS[] = {1, 2, 3, 4, 6, 9, 14, 22};
constexpr double SURE = 0.995;
enum Agreement { ALONE, UNANIMOUS, LEADING, CONTESTED };

int64_t of_two(int64_t before, int64_t token, int64_t mask) {
    return ((before * 0x9E3779B1LL >> 12) ^ token) & mask;
}

struct Text {
    std::vector<int32_t> tokens, one_before, two_before, one_heads, two_heads;
    int64_t size = 0, mask = -1;

    // Takes constant time for a token, averaged over the doublings of the tables.
    void extend(const int32_t* more, int64_t count) {
        tokens.insert(tokens.end(), more, more + count);
        int64_t start = size;
        size += count;
        if (size > mask + 1) {
            mask = std::max<int64_t>(mask, FIRST_HEADS - 1);
            while (size > mask + 1) mask = 2 * mask + 1;
            for (auto* each : {&one_before, &two_before, &one_heads, &two_heads}) each->assign(size_t(mask) + 1, -1);
            start = 0;
        }
        int64_t before = start ? tokens[start - 1] : GAP;
        for (int64_t place = start; place < size; ++place) {
            const int64_t token = tokens[place];
            int32_t& one = one_heads[token & mask];
            int32_t& two = two_heads[of_two(before, token, mask)];
            one_before[place] = one;
            two_before[place] = two;
            one = two = int32_t(place);
            before = token;
        }
    }
};

// Where an answer goes on in its prediction. end: [MATCH], the answer's last `ended` tokens. appeared: of each token of
// the prediction, whether the answer had it where it was expected. left: the place after which the search begins.
struct Followed {
    const Text* text;
    uint8_t* appeared;
    int32_t* end;
    int64_t ended, length, source, left, accepted;
};

// A text to copy from. right, seen: decayed observations of each bucket and agreement. habit: [2], copies from it that
// began right, and those that were expected to; null: unknown. at: where the last copy from it would go on, -1: there
// was none. followed: set for a prediction, which has one place. own: whether it is the text whose end is looked for.
struct Source {
    const Text* text;
    const double* right;
    const double* seen;
    const double* habit;
    const Followed* followed;
    int64_t at, own;
};

struct Place {
    int64_t length, source;
    const Source* from;
};

using Tokens = std::vector<int32_t>;

int64_t match(const Text& text, int64_t source, const Tokens& end) {
    if (source > text.size) return 0;
    const int64_t most = std::min<int64_t>(source, end.size());
    int64_t length = 0;
    while (length < most && text.tokens[source - 1 - length] == end[end.size() - 1 - length]) ++length;
    return length;
}

// The newest places where the last two or more tokens of `end` occur, else those of its last one. itself: whether `end`
// is the text's own, whose last place is none.
void earlier(const Source& from, const Tokens& end, bool itself, std::vector<Place>& places) {
    const Text& text = *from.text;
    if (end.empty() || !text.size) return;
    const int32_t last = end.back(), before = end.size() > 1 ? end[end.size() - 2] : GAP;
    const size_t first = places.size();
    int64_t two = end.size() > 1 ? text.two_heads[of_two(before, last, text.mask)] : -1;
    int64_t one = text.one_heads[last & text.mask];
    if (itself) two = text.two_before[text.size - 1], one = text.one_before[text.size - 1];
    for (int step = 0; step < STEPS && two >= 1 && places.size() - first < CANDIDATES; ++step) {
        // Occurrences may overlap the text's end: a repeated unit continues itself.
        if (text.tokens[two] == last && text.tokens[two - 1] == before)
            places.push_back({match(text, two + 1, end), two + 1, &from});
        two = text.two_before[two];
    }
    if (places.size() > first) return;
    for (int step = 0; step < STEPS && one >= 0 && places.size() - first < CANDIDATES; ++step) {
        if (text.tokens[one] == last) places.push_back({1, one + 1, &from});
        one = text.one_before[one];
    }
}

// Of a prediction's places: a longer match first, then one ahead of where the answer left, then a near one.
Place nearest(const Followed& followed, const Tokens& end) {
    const Text& text = *followed.text;
    const Source from{&text, nullptr, nullptr, nullptr, nullptr, -1, 0};
    std::vector<Place> places;
    for (int64_t at = followed.left; at < std::min(followed.left + NEAR, text.size); ++at)
        if (text.tokens[at] == end.back()) places.push_back({match(text, at + 1, end), at + 1, &from});
    earlier(from, end, false, places);
    Place best{0, followed.left, nullptr};
    const auto better = [&](const Place& one, const Place& other) {
        if (one.length != other.length) return one.length > other.length;
        const bool ahead = one.source > followed.left, behind = other.source > followed.left;
        if (ahead != behind) return ahead;
        return std::abs(one.source - followed.left) < std::abs(other.source - followed.left);
    };
    for (const Place& each : places)
        if (best.length == 0 || better(each, best)) best = each;
    return best;
}

Tokens ending(const int32_t* tokens, int64_t size, const int32_t* more, int64_t count) {
    const int64_t kept = std::max<int64_t>(0, std::min<int64_t>(size, MATCH - count));
    Tokens end(tokens + size - kept, tokens + size);
    end.insert(end.end(), more + std::max<int64_t>(0, count - MATCH), more + count);
    return end;
}

// Where the answer goes on in its prediction behind `drafts`, if these are right.
Place behind(const Source& from, const int32_t* drafts, int64_t drafted) {
    const Followed& followed = *from.followed;
    const Text& text = *followed.text;
    Place place{followed.length, followed.source, &from};
    if (!drafted) return place;
    const bool agrees = place.length && place.source + drafted <= text.size &&
                        std::equal(drafts, drafts + drafted, text.tokens.data() + place.source);
    if (agrees) return {std::min<int64_t>(place.length + drafted, MATCH), place.source + drafted, &from};
    place = nearest(followed, ending(followed.end, followed.ended, drafts, drafted));
    return {place.length, place.source, &from};
}

// The token `offset` behind a place, -1: none. Behind the end of the own text come the drafts, then the copy itself.
int32_t ahead(const Place& place, int64_t offset, const int32_t* drafts, int64_t drafted) {
    const Text& text = *place.from->text;
    if (place.from->own) {
        const int64_t period = text.size + drafted - place.source;
        if (period <= 0) return GAP;
        offset %= period;
    }
    const int64_t at = place.source + offset;
    if (at < text.size) return text.tokens[at];
    return place.from->own ? drafts[at - text.size] : GAP;
}

}  // namespace

extern "C" Text* whiflash_text() { return new Text; }
extern "C" void whiflash_text_end(Text* text) { delete text; }
extern "C" void whiflash_extend(Text* text, const int32_t* tokens, int64_t count) { text->extend(tokens, count); }
extern "C" void whiflash_tokens(const Text* text, int32_t* tokens) {
    std::copy(text->tokens.begin(), text->tokens.end(), tokens);
}
extern "C" int64_t whiflash_bytes(const Text* text) {
    return int64_t(sizeof(int32_t) * (text->tokens.capacity() + 4 * text->one_heads.capacity()));
}

// Advances a prediction by tokens of the answer, with bounded work for each.
extern "C" void whiflash_follow(Followed* followed, const int32_t* tokens, int64_t count) {
    const Text& text = *followed->text;
    for (int64_t i = 0; i < count; ++i) {
        const Tokens end = ending(followed->end, followed->ended, tokens + i, 1);
        std::copy(end.begin(), end.end(), followed->end);
        followed->ended = end.size();
        const int64_t source = followed->source;
        if (followed->length && source < text.size && text.tokens[source] == tokens[i]) {
            followed->accepted += !followed->appeared[source];
            followed->appeared[source] = 1;
            if (followed->length >= SETTLED) followed->left = source + 1;
            followed->length = std::min<int64_t>(followed->length + 1, MATCH);
            ++followed->source;
        } else {
            const Place place = nearest(*followed, end);
            followed->length = place.length;
            followed->source = place.source;
        }
    }
}

// The copy behind the end of the own text among `sources` and `drafts`: up to `most` (> 0) tokens, the first and the first
// `paid` in any case, each of the others with a chance of at least `worth` if those that are paid are accepted. It ends
// with the first of `stops`. Returns how many; 0: no place matches by `least` tokens. The longest match is copied from, of
// equals the first in the order of `sources`.
//
// alive: the chance that all before is accepted. place: [3], the match's length, its place, and the number of its source.
// tokens, alives, agreements: [most].
extern "C" int64_t whiflash_copy(
    const Source* sources, int64_t count, const int32_t* drafts, int64_t drafted, const int32_t* stops, int64_t stopping,
    int64_t least, int64_t most, double worth, double alive, int64_t paid, int64_t* place, int32_t* tokens,
    double* alives, int32_t* agreements
) {
    const auto stop = [&](int32_t token) { return std::find(stops, stops + stopping, token) != stops + stopping; };
    if (std::any_of(drafts, drafts + drafted, stop)) return 0;
    const auto own = std::find_if(sources, sources + count, [](const Source& each) { return each.own; });
    const Tokens end = ending(own->text->tokens.data(), own->text->size, drafts, drafted);
    std::vector<Place> places;
    for (const Source* from = sources; from < sources + count; ++from) {
        if (from->followed) {
            places.push_back(behind(*from, drafts, drafted));
            continue;
        }
        const size_t first = places.size();
        const int64_t source = from->at + drafted;
        // The place copied from has moved on, and may no longer be among a chain's newest ones.
        if (from->at >= 0) places.push_back({match(*from->text, source, end), source, from});
        const size_t newest = places.size();
        earlier(*from, end, from->own && !drafted, places);
        const auto same = [&](const Place& each) { return newest > first && each.source == source; };
        places.erase(std::remove_if(places.begin() + newest, places.end(), same), places.end());
    }
    const auto silent = [&](const Place& each) { return each.length < least || ahead(each, 0, drafts, drafted) < 0; };
    places.erase(std::remove_if(places.begin(), places.end(), silent), places.end());
    if (places.empty()) return 0;
    const auto shorter = [](const Place& one, const Place& other) { return one.length < other.length; };
    const Place best = *std::max_element(places.begin(), places.end(), shorter);  // the first of equals
    place[0] = best.length;
    place[1] = best.source;
    place[2] = best.from - sources;
    const double factor = best.from->habit ? best.from->habit[0] / best.from->habit[1] : 1.0;
    for (int64_t at = 0; at < most; ++at) {
        const int32_t token = ahead(best, at, drafts, drafted);
        if (token < 0) return at;
        // How the places that agreed so far judge the token. Those that end here say nothing.
        int64_t longest = 0, against = 0;
        size_t following = 0;
        for (const Place& each : places) {
            const int32_t other = ahead(each, at, drafts, drafted);
            if (other == token) longest = std::max(longest, each.length);
            else if (other >= 0) against = std::max(against, each.length);
            if (other == token) places[following++] = each;
        }
        places.resize(following);
        const int agreement = against ? (against < longest ? LEADING : CONTESTED) : following == 1 ? ALONE : UNANIMOUS;
        const int bucket = int(std::upper_bound(std::begin(BUCKETS), std::end(BUCKETS), best.length + at) - BUCKETS) - 1;
        const int kind = bucket * KINDS + agreement;
        const double chance = best.from->right[kind] / best.from->seen[kind];
        alive *= std::min(at ? chance : chance * factor, SURE);
        if (at && at >= paid && !(alive >= worth)) return at;
        if (at == paid - 1) worth *= alive;
        tokens[at] = token;
        alives[at] = alive;
        agreements[at] = agreement;
        if (stop(token)) return at + 1;
    }
    return most;
}

namespace {

struct Match {
    int64_t length, source;
};

// The places that `propose_copies` compares in text t[0:size]: where the last copy goes on, then the newest matches.
std::vector<Match> matches(const int64_t* t, int64_t size, int64_t going_on, int64_t least) {
    const auto matched = [&](int64_t source) {
        int64_t length = 0;
        while (length < std::min<int64_t>(source, MATCH) && t[source - 1 - length] == t[size - 1 - length]) ++length;
        return length >= least ? length : 0;
    };
    std::vector<int64_t> one, two;
    for (int64_t place = size - 1; place > 0 && two.size() < CANDIDATES; --place) {
        if (t[place - 1] != t[size - 1]) continue;
        if (place > 1 && t[place - 2] == t[size - 2]) two.push_back(place);
        if (one.size() < CANDIDATES) one.push_back(place);
    }
    std::vector<Match> found;
    if (going_on > 0 && going_on < size) found.push_back({matched(going_on), going_on});
    for (const int64_t place : two.empty() ? one : two)
        if (place != going_on) found.push_back({matched(place), place});
    found.erase(std::remove_if(found.begin(), found.end(), [](Match each) { return !each.length; }), found.end());
    return found;
}

}  // namespace

// `propose_copies` for `requests` texts, rows `slots` of `tokens` [slots, stride], of `sizes` tokens each, its drafts
// among them. limits: beyond those drafts. before: [requests], each last draft's chance; null: copies go behind the
// text, and `back` is written. The rest as of `propose_copies`; results [requests, width], [requests], zero at the call.
extern "C" void whiflash_propose(
    const int64_t* tokens, int64_t stride, const int64_t* slots, const int64_t* sizes, int64_t* back,
    const int64_t* limits, const float* factors, const float* chances, const int32_t* boundaries, int64_t buckets,
    int64_t requests, int64_t width, float worth, int64_t least, const float* before,
    int64_t* out, int64_t* counts, float* alives, int32_t* agreements, int64_t* lengths
) {
    for (int64_t b = 0; b < requests; ++b) {
        const int64_t size = sizes[b], last = back[slots[b]];
        const int64_t* t = tokens + slots[b] * stride;
        std::vector<Match> places = matches(t, size, last > 0 ? size - last : 0, least);
        if (places.empty()) continue;
        const auto shorter = [](Match one, Match other) { return one.length < other.length; };
        const Match best = *std::max_element(places.begin(), places.end(), shorter);  // the first of equals
        lengths[b] = best.length;
        if (!before) back[slots[b]] = size - best.source;
        float alive = before ? before[b] : 1.0f;
        for (int64_t depth = 0; depth < std::min(limits[b], width); ++depth) {
            const auto following = [&](Match each) { return t[each.source + depth % (size - each.source)]; };
            const int64_t token = following(best);
            int64_t with = 0, without = 0;
            const bool single = places.size() == 1;
            for (const Match each : places) {
                int64_t& side = following(each) == token ? with : without;
                side = std::max(side, each.length);
            }
            const int agreed = !without ? (single ? ALONE : UNANIMOUS) : with > without ? LEADING : CONTESTED;
            const auto parted = [&](Match each) { return following(each) != token; };
            const int32_t* bucket = std::upper_bound(boundaries, boundaries + buckets, best.length + depth);
            const int64_t row = std::max<int64_t>(bucket - boundaries - 1, 0);
            const float known = chances[(b * buckets + row) * KINDS + agreed];
            alive *= std::min(depth ? known : known * factors[b], float(SURE));
            if (token < 0 || ((depth || before) && !(alive >= worth))) break;
            const int64_t at = b * width + depth;
            out[at] = token, alives[at] = alive, agreements[at] = agreed;
            ++counts[b];
            places.erase(std::remove_if(places.begin(), places.end(), parted), places.end());
        }
    }
}
