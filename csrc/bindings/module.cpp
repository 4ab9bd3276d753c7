#include <nanobind/nanobind.h>

#include "bindings/copier.h"
#include "bindings/crc32c.h"
#include "bindings/identity.h"
#include "bindings/memory.h"
#include "bindings/reader.h"
#include "bindings/shuffle.h"

NB_MODULE(_core, module) {
  nanobind::set_leak_warnings(false);  // a checkpointer may well outlive the interpreter's own end
  dscheck::bind_copier(module);
  dscheck::bind_crc32c(module);
  dscheck::bind_identity(module);
  dscheck::bind_memory(module);
  dscheck::bind_reader(module);
  dscheck::bind_shuffle(module);
}
