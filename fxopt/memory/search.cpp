// The search of search.py, statement by statement; read that first. native.py compiles and calls this.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <utility>
#include <vector>

namespace {

using Number = std::int64_t;

constexpr Number PLACED = std::numeric_limits<Number>::max();
constexpr Number NONE = -1;
enum Answer : int { IMPOSSIBLE = 0, FOUND = 1, NOT_YET = 2 };

struct Item {
  Number low, high, size, align;
};

struct Range {
  std::size_t begin, end;  // in Search::pool_
};

struct Part {
  Range items;
  Number floor, last, parent, after;  // parent is a frame, after a part
};

struct Frame {
  Number part;
  Range choices;
  std::size_t trail, parts, pool;  // how long they were: what came later goes with a wrong choice
};

Number rounded(Number number, Number multiple) { return (number + multiple - 1) / multiple * multiple; }

class Search {
 public:
  Search(std::vector<Item> items, Number sections, Number capacity)
      : offsets(items.size(), 0),
        items_(std::move(items)),
        capacity_(capacity),
        lowest_(items_.size() + 1, 0),
        twin_(items_.size()),
        beside_(items_.size()),
        total_(sections, 0),
        crossing_(sections + 1, 0),
        above_(sections, 0) {
    lowest_.back() = PLACED;
    for (Number number = 0; number < count(); ++number) {
      const Item& item = items_[number];
      twin_[number] = twin(number);
      for (Number section = item.low; section < item.high; ++section) {
        total_[section] += item.size;
        if (section > item.low) ++crossing_[section];
      }
      for (Number other = 0; other < count(); ++other)
        if (other != number && items_[other].low < item.high && item.low < items_[other].high)
          beside_[number].push_back(other);
    }
    for (Number section = 0; section < sections; ++section)
      if (total_[section] > capacity_) return;
    std::vector<Number> cuts, all(count());
    for (Number section = 1; section < sections; ++section)
      if (crossing_[section] == 0) cuts.push_back(section);
    for (Number number = 0; number < count(); ++number) all[number] = number;
    follow(split(all, cuts, Part{{}, 0, NONE, NONE, NONE}));
  }

  Answer run(Number& steps, double seconds) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (frame_ != NONE && !found_ && steps > 0) {
      if (steps % 16 == 0 && std::chrono::steady_clock::now() > deadline) break;
      frames_.resize(frame_ + 1);
      Frame& frame = frames_[frame_];
      undo(frame);
      if (frame.choices.begin == frame.choices.end) {
        frame_ = parts_[frame.part].parent;
        continue;
      }
      --steps;
      const Number chosen = pool_[--frame.choices.end];
      step(parts_[frame.part], chosen);
    }
    return found_ ? FOUND : frame_ != NONE ? NOT_YET : IMPOSSIBLE;
  }

  std::vector<Number> offsets;

 private:
  Number count() const { return static_cast<Number>(items_.size()); }

  void step(const Part part, Number chosen) {
    const Item& item = items_[chosen];
    const Number offset = lowest_[chosen];
    if (!place(chosen, offset)) return;
    std::vector<Number> rest;
    for (std::size_t place = part.items.begin; place < part.items.end; ++place)
      if (pool_[place] != chosen) rest.push_back(pool_[place]);
    if (!can_rest_above(offset, rest)) return;
    std::vector<Number> cuts;
    for (Number section = item.low + 1; section < item.high; ++section)
      if (crossing_[section] == 0) cuts.push_back(section);
    follow(split(rest, cuts, Part{{}, offset, chosen, frame_, part.after}));
  }

  bool place(Number chosen, Number offset) {
    const Item& item = items_[chosen];
    const Number top = offset + item.size;
    offsets[chosen] = offset;
    set(lowest_[chosen], PLACED);
    for (Number section = item.low; section < item.high; ++section) {
      set(total_[section], total_[section] - item.size);
      if (section > item.low) set(crossing_[section], crossing_[section] - 1);
    }
    for (const Number number : beside_[chosen]) {
      if (lowest_[number] >= top) continue;
      const Item& other = items_[number];
      const Number lifted = rounded(top, other.align);
      if (lifted + other.size > capacity_) return false;
      set(lowest_[number], lifted);
    }
    return true;
  }

  bool can_rest_above(Number floor, const std::vector<Number>& rest) {
    std::fill(above_.begin(), above_.end(), capacity_);
    Number first = static_cast<Number>(above_.size()), last = 0;
    for (const Number number : rest) {
      const Item& item = items_[number];
      Number low = lowest_[number];
      first = std::min(first, item.low);
      last = std::max(last, item.high);
      if (low < floor) {
        Number support = PLACED;
        for (const Number other : beside_[number])
          if (lowest_[other] != PLACED) support = std::min(support, std::max(lowest_[other], floor) + items_[other].size);
        if (support == PLACED) return false;
        low = rounded(support, item.align);
      }
      for (Number section = item.low; section < item.high; ++section) above_[section] = std::min(above_[section], low);
    }
    for (Number section = first; section < last; ++section)
      if (above_[section] + total_[section] > capacity_) return false;
    return true;
  }

  // The first part to solve after `items` were cut; `like` holds what all parts have in common.
  Number split(const std::vector<Number>& items, const std::vector<Number>& cuts, Part like) {
    std::vector<std::vector<Number>> groups(cuts.size() + 1);
    std::vector<std::size_t> met;  // as they are met, which decides between groups of one length
    for (const Number number : items) {
      const auto after = std::upper_bound(cuts.begin(), cuts.end(), items_[number].low);
      const std::size_t group = static_cast<std::size_t>(after - cuts.begin());
      if (groups[group].empty()) met.push_back(group);
      groups[group].push_back(number);
    }
    const auto longer = [&](std::size_t a, std::size_t b) { return groups[a].size() > groups[b].size(); };
    std::stable_sort(met.begin(), met.end(), longer);
    Number todo = like.after;
    for (const std::size_t group : met) {
      like.items = {pool_.size(), pool_.size() + groups[group].size()};
      like.after = todo;
      pool_.insert(pool_.end(), groups[group].begin(), groups[group].end());
      todo = static_cast<Number>(parts_.size());
      parts_.push_back(like);
    }
    return todo;
  }

  // Open a part, or be done if there is none left.
  void follow(Number todo) {
    if (todo == NONE) {
      found_ = true;
      return;
    }
    const Part part = parts_[todo];
    Number ceiling = PLACED;
    for (std::size_t place = part.items.begin; place < part.items.end; ++place) {
      const Number number = pool_[place];
      ceiling = std::min(ceiling, lowest_[number] + items_[number].size);
    }
    std::vector<Number> choices;
    for (std::size_t place = part.items.begin; place < part.items.end; ++place) {
      const Number number = pool_[place], low = lowest_[number];
      if (part.floor <= low && low < ceiling && (low > part.floor || number > part.last) &&
          lowest_[twin_[number]] == PLACED)
        choices.push_back(number);
    }
    const auto lower = [&](Number a, Number b) { return lowest_[a] < lowest_[b]; };
    std::stable_sort(choices.begin(), choices.end(), lower);
    const Range range{pool_.size(), pool_.size() + choices.size()};
    pool_.insert(pool_.end(), choices.rbegin(), choices.rend());
    frame_ = static_cast<Number>(frames_.size());
    frames_.push_back({todo, range, trail_.size(), parts_.size(), pool_.size()});
  }

  void set(Number& where, Number value) {
    trail_.emplace_back(&where, where);
    where = value;
  }

  void undo(const Frame& frame) {
    for (; trail_.size() > frame.trail; trail_.pop_back()) *trail_.back().first = trail_.back().second;
    parts_.resize(frame.parts);
    pool_.resize(frame.pool);
  }

  Number twin(Number number) const {
    const Item& item = items_[number];
    for (Number other = number - 1; other >= 0; --other) {
      const Item& before = items_[other];
      if (before.low == item.low && before.high == item.high && before.size == item.size && before.align == item.align)
        return other;
    }
    return count();
  }

  const std::vector<Item> items_;
  const Number capacity_;
  std::vector<Number> lowest_, twin_;
  std::vector<std::vector<Number>> beside_;
  std::vector<Number> total_, crossing_, above_;
  std::vector<std::pair<Number*, Number>> trail_;
  std::vector<Number> pool_;
  std::vector<Part> parts_;
  std::vector<Frame> frames_;
  Number frame_ = NONE;
  bool found_ = false;
};

}  // namespace

extern "C" {

// Null if there is no memory for it. `items` holds low, high, size and align of one item after the other.
void* fxopt_search_new(const Number* items, Number count, Number sections, Number capacity) {
  try {
    std::vector<Item> all;
    for (Number place = 0; place < count; ++place, items += 4) all.push_back({items[0], items[1], items[2], items[3]});
    return new Search(std::move(all), sections, capacity);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// 1 found, 0 impossible, 2 not yet, 3 out of memory. Takes the steps that it makes off `steps`.
int fxopt_search_run(void* search, Number* steps, double seconds) {
  try {
    return static_cast<Search*>(search)->run(*steps, seconds);
  } catch (const std::bad_alloc&) {
    return 3;
  }
}

void fxopt_search_offsets(const void* search, Number* offsets) {
  const auto& found = static_cast<const Search*>(search)->offsets;
  std::copy(found.begin(), found.end(), offsets);
}

void fxopt_search_delete(void* search) { delete static_cast<Search*>(search); }

}
