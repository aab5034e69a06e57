// Torch's CPU allocator, counted: what tensors hold now, and the most they held since the count was reset.
// Built and loaded by benchmarks/memory_ranks.py.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace {

std::mutex guard;
std::unordered_map<void*, size_t> sizes;
long long live = 0, peak = 0;
c10::Allocator* inner = nullptr;

void release(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = sizes.find(pointer);
    if (found != sizes.end()) {
      live -= static_cast<long long>(found->second);
      sizes.erase(found);
    }
  }
  inner->raw_deallocate(pointer);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = inner->raw_allocate(bytes);
    if (pointer) {
      std::lock_guard<std::mutex> lock(guard);
      sizes[pointer] = bytes;
      live += static_cast<long long>(bytes);
      peak = std::max(peak, live);
    }
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Counting counting;

}  // namespace

extern "C" {

void start_counting() {
  inner = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&counting, 255);
}

long long live_bytes() {
  std::lock_guard<std::mutex> lock(guard);
  return live;
}

long long peak_bytes() {
  std::lock_guard<std::mutex> lock(guard);
  return peak;
}

void reset_peak() {
  std::lock_guard<std::mutex> lock(guard);
  peak = live;
}

int is_counted(void* pointer) {
  std::lock_guard<std::mutex> lock(guard);
  return sizes.count(pointer) > 0;
}
}
