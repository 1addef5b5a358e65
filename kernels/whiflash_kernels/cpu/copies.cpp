// Two searches for copies. `whiflash_copy`, on the host: what `copying/index.py` and `copying/copier.py` of
// whiflash_sglang do in Python, which is the specification: the same chains, places, votes, and chances to the last
// bit. `whiflash_propose`, for a batch: `propose_copies` of `whiflash_kernels.copies`, whose body is its specification.
//
// All memory is the caller's. A `Text` is T tokens with, for each, the place before it with the same hash of its last
// token (`one_before`) or its last two (`two_before`), and the tables of the newest places (`..._heads`), `mask` + 1
// entries each.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int CANDIDATES = 8, STEPS = 32, MATCH = 32, KINDS = 4, GAP = -1;
constexpr int BUCKETS[] = {1, 2, 3, 4, 6, 9, 14, 22};
constexpr double SURE = 0.995;
enum Agreement { ALONE, UNANIMOUS, LEADING, CONTESTED };

struct Text {
    const int32_t* tokens;
    int32_t* one_before;
    int32_t* two_before;
    int32_t* one_heads;
    int32_t* two_heads;
    int64_t size, mask, broken;  // broken: tokens below zero are among them
};

struct Place {
    int length;
    int64_t source;
    std::vector<int32_t> ahead;
};

int64_t of_two(int64_t before, int64_t token, int64_t mask) {
    return ((before * 0x9E3779B1LL >> 12) ^ token) & mask;
}

int match(const Text& text, int64_t source, const std::vector<int32_t>& end) {
    if (source > text.size) return 0;
    const int most = int(std::min<int64_t>(source, end.size()));
    int length = 0;
    while (length < most && text.tokens[source - 1 - length] == end[end.size() - 1 - length]) ++length;
    return length;
}

std::vector<Place> earlier(const Text& text, int64_t two, int64_t one, const std::vector<int32_t>& end) {
    const int32_t last = end.back(), before = end.size() > 1 ? end[end.size() - 2] : GAP;
    std::vector<Place> places;
    for (int step = 0; step < STEPS && two >= 1 && places.size() < CANDIDATES; ++step) {
        if (text.tokens[two] == last && text.tokens[two - 1] == before)
            places.push_back({match(text, two + 1, end), two + 1, {}});
        two = text.two_before[two];
    }
    if (!places.empty()) return places;
    for (int step = 0; step < STEPS && one >= 0 && places.size() < CANDIDATES; ++step) {
        if (text.tokens[one] == last) places.push_back({1, one + 1, {}});
        one = text.one_before[one];
    }
    return places;
}

std::vector<int32_t> continuation(
    const Text& text, int64_t source, size_t most, const int32_t* drafts, size_t drafted
) {
    std::vector<int32_t> ahead;
    if (source < text.size)
        ahead.assign(text.tokens + source, text.tokens + std::min<int64_t>(source + most, text.size));
    if (text.broken) {
        const auto image = std::find_if(ahead.begin(), ahead.end(), [](int32_t token) { return token < 0; });
        if (image != ahead.end()) return {ahead.begin(), image};
    }
    ahead.insert(ahead.end(), drafts, drafts + std::min(drafted, most - ahead.size()));
    for (size_t period = ahead.size(), at = 0; period && ahead.size() < most; ++at) ahead.push_back(ahead[at]);
    return ahead;
}

// How the places judge each token of the best one's copy.
std::vector<int32_t> votes(const std::vector<Place>& places, const Place& best) {
    std::vector<int32_t> agreements;
    std::vector<std::pair<size_t, int>> following;  // of each place: tokens that it shares with the copy, its match
    for (const Place& place : places) {
        const size_t most = std::min(place.ahead.size(), best.ahead.size());
        const auto parts = std::mismatch(place.ahead.begin(), place.ahead.begin() + most, best.ahead.begin());
        following.push_back({parts.first - place.ahead.begin(), place.length});
    }
    for (size_t at = 0; at < best.ahead.size(); ++at) {
        int longest = -1, against = -1;
        for (auto [shared, length] : following) {
            int& side = shared > at ? longest : against;
            side = std::max(side, length);
        }
        const bool split = against >= 0;
        agreements.push_back(
            split ? (against < longest ? LEADING : CONTESTED) : following.size() == 1 ? ALONE : UNANIMOUS);
        const auto parted = [at](const auto& each) { return each.first <= at; };
        following.erase(std::remove_if(following.begin(), following.end(), parted), following.end());
    }
    return agreements;
}

}  // namespace

// Enters tokens from `start` on into chains and tables.
extern "C" void whiflash_link(const Text* text, int64_t start) {
    int64_t before = start ? text->tokens[start - 1] : GAP;
    for (int64_t place = start; place < text->size; ++place) {
        const int64_t token = text->tokens[place];
        int32_t& one = text->one_heads[token & text->mask];
        int32_t& two = text->two_heads[of_two(before, token, text->mask)];
        text->one_before[place] = one;
        text->two_before[place] = two;
        one = two = int32_t(place);
        before = token;
    }
}

// The copy behind the text's end and `drafts`: up to `most` (> 0) tokens, the first and the first `paid` in any case, each
// of the others with a chance of at least `worth` if those that are paid are accepted. Returns how many; 0: no place
// matches.
//
// copied_from: where the text would go on with the last copy; -1: there was none. right, seen: decayed observations of
// each bucket and agreement. factor: on the first token's chance. alive: the chance that all before is accepted.
// place: [2], the match's length and its source. tokens, alives, agreements: [most].
extern "C" int64_t whiflash_copy(
    const Text* text, const int32_t* drafts, int64_t drafted, int64_t copied_from, int64_t least, int64_t most,
    const double* right, const double* seen, double factor, double worth, double alive,
    int64_t paid, int64_t* place, int32_t* tokens, double* alives, int32_t* agreements
) {
    const int64_t kept = std::max<int64_t>(0, std::min<int64_t>(text->size, MATCH - drafted));
    std::vector<int32_t> end(text->tokens + text->size - kept, text->tokens + text->size);
    end.insert(end.end(), drafts + std::max<int64_t>(0, drafted - MATCH), drafts + drafted);
    std::vector<Place> places;
    const int64_t last = text->size - 1;
    if (drafted && text->size) {
        const bool pair = end.size() > 1;
        const int64_t two = pair ? text->two_heads[of_two(end[end.size() - 2], end.back(), text->mask)] : -1;
        places = earlier(*text, two, text->one_heads[end.back() & text->mask], end);
    } else if (last >= 1) {
        places = earlier(*text, text->two_before[last], text->one_before[last], end);
    }
    if (copied_from >= 0) {
        const int64_t source = copied_from + drafted;
        const int length = match(*text, source, end);
        const auto same = [&](const Place& each) { return each.source == source && each.length == length; };
        const auto known = std::find_if(places.begin(), places.end(), same);
        if (known != places.end()) places.erase(known);
        places.insert(places.begin(), {length, source, {}});
    }
    for (Place& each : places) {
        if (each.length >= least) each.ahead = continuation(*text, each.source, most, drafts, drafted);
    }
    const auto silent = [](const Place& each) { return each.ahead.empty(); };
    places.erase(std::remove_if(places.begin(), places.end(), silent), places.end());
    if (places.empty()) return 0;
    const auto shorter = [](const Place& one, const Place& other) { return one.length < other.length; };
    const Place& best = *std::max_element(places.begin(), places.end(), shorter);  // the first of equals
    place[0] = best.length;
    place[1] = best.source;
    const std::vector<int32_t> agreed = votes(places, best);
    for (size_t at = 0; at < agreed.size(); ++at) {
        const int64_t length = best.length + at;
        const int bucket = int(std::upper_bound(std::begin(BUCKETS), std::end(BUCKETS), length) - BUCKETS) - 1;
        const int kind = bucket * KINDS + agreed[at];
        const double chance = right[kind] / seen[kind];
        alive *= std::min(at ? chance : chance * factor, SURE);
        if (at && int64_t(at) >= paid && !(alive >= worth)) return at;
        if (int64_t(at) == paid - 1) worth *= alive;
        tokens[at] = best.ahead[at];
        alives[at] = alive;
        agreements[at] = agreed[at];
    }
    return agreed.size();
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
