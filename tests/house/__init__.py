"""The rules that hold for the whole house: imports, private names, sizes, the public interface."""
